#!/usr/bin/env bash
# Everything that needs a GPU, in one command, under nine minutes and without network:
# build, GPU tests, compute-sanitizer on small cases, the benchmarks of the ops, a summary last.
#
#   benchmarks/run_on_gpu.sh [--dry-run]
#
# --dry-run walks every step on a machine without a GPU: every import, file and flag, no build and no measurement.
# PYTHON (default python3) needs torch, triton, pytest and the build tools, nothing is installed; OUT (default
# benchmarks/results/run) takes one log a step, summary.md and results.tar.gz. Results: benchmarks/results/<device>/.
# A step that fails does not keep the next from running; the exit status is 1 then, and the summary names it.
set -uo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-$ROOT/benchmarks/results/run}"
SECONDS_IN_ALL=525

DRY=""
case "${1:-}" in
  "") ;;
  --dry-run) DRY=1 ;;
  *) echo "usage: $0 [--dry-run]" >&2; exit 2 ;;
esac

mkdir -p "$OUT" || exit 2
OUT="$(cd "$OUT" && pwd)"
WORK="$(mktemp -d)" || exit 2
trap 'rm -rf "$WORK"' EXIT
TREE="$WORK/tree"
RESULTS="$ROOT/benchmarks/results"
# Less than a minute on an idle core; a loaded machine is given longer.
[ -z "$DRY" ] || { RESULTS="$WORK/results"; SECONDS_IN_ALL=1200; }
export HF_HUB_OFFLINE=1 TRITON_CACHE_DIR="$WORK/triton" TORCHINDUCTOR_CACHE_DIR="$WORK/inductor"
export BRIDGE_STG_REVISION="${BRIDGE_STG_REVISION:-$(git -C "$ROOT" describe --always --dirty=+ 2>/dev/null || echo unknown)}"

NAMES=() STATES=() TIMES=()

# step NAME LIMIT COMMAND...: run it in the tree, log it, and never for longer than LIMIT or what is left of the time.
step() {
  local name="$1" limit="$2" start=$SECONDS left=$((SECONDS_IN_ALL - SECONDS)) status
  shift 2
  [ "$limit" -le "$left" ] || limit=$left
  echo "== $name: $*"
  if [ "$limit" -lt 5 ]; then
    status=124
    echo "no time left" > "$OUT/$name.log"
  else
    (cd "$TREE" && timeout -k 5 "$limit" "$@") > "$OUT/$name.log" 2>&1
    status=$?
  fi
  case $status in
    0) STATES+=("passed") ;;
    124 | 137) STATES+=("FAILED: out of time after $limit s") ;;
    *) STATES+=("FAILED: exit status $status") ;;
  esac
  NAMES+=("$name") TIMES+=($((SECONDS - start)))
  echo "   ${STATES[-1]}, ${TIMES[-1]} s"
  [ $status -eq 0 ] || tail -n 15 "$OUT/$name.log" | sed 's/^/   | /'
  return $status
}

skip() {
  echo "== $1: skipped, $2"
  echo "$2" > "$OUT/$1.log"
  NAMES+=("$1") STATES+=("skipped: $2") TIMES+=(0)
}

# The package runs from a copy of the source, with the libraries built into it and PYTHONPATH at it.
stage() {
  local name
  mkdir -p "$TREE"
  for name in benchmarks bridge_stg csrc tests triton_kernels docs setup.py pyproject.toml CMakeLists.txt README.md \
    LICENSE CHANGELOG.md; do
    cp -r "$ROOT/$name" "$TREE/" || return 1
  done
  rm -rf "$TREE/bridge_stg/lib" "$TREE"/bridge_stg/*.so "$TREE/bridge_stg/triton_kernels" "$TREE/benchmarks/results"
  # An installation puts it there; a checkout keeps it beside.
  ln -s ../triton_kernels "$TREE/bridge_stg/triton_kernels"
}

build() {
  local capability
  capability="$("$PYTHON" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability()))')" || return 1
  BRIDGE_STG_CUDA=1 TORCH_CUDA_ARCH_LIST="$capability" "$PYTHON" setup.py build_ext --inplace &&
    "$PYTHON" -m benchmarks.gpu.preflight --built
}
export -f build
export PYTHON PYTHONPATH="$TREE"

stage || { echo "the source could not be copied to $TREE" >&2; exit 1; }
mapfile -t GPU_TESTS < <(cd "$TREE" && grep -rlE 'mark\.gpu' --include='test_*.py' tests | sort)
LEFT_OUT=""
if ! "$PYTHON" -c 'import av' 2> /dev/null; then
  # The ops need no video; without PyAV the rooms above them cannot even be collected.
  LEFT_OUT="$(printf '%s\n' "${GPU_TESTS[@]}" | grep -vE '^tests/(benchmarks|modules|ops|triton_kernels)/' | tr '\n' ' ')"
  mapfile -t GPU_TESTS < <(printf '%s\n' "${GPU_TESTS[@]}" | grep -E '^tests/(benchmarks|modules|ops|triton_kernels)/')
fi
PARALLEL=()
"$PYTHON" -c 'import xdist' 2>/dev/null && PARALLEL=(-n "$([ -n "$DRY" ] && echo 0 || echo 4)")
PYTEST=("$PYTHON" -m pytest -m gpu -q -p no:cacheprovider --continue-on-collection-errors "${PARALLEL[@]}" "${GPU_TESTS[@]}")
# Without tube_latency: a coupled answer of 64 boxes is a thousand forwards, and would take the time of the others.
BENCH=("$PYTHON" -m benchmarks attend_memory patchify_frames prune_tokens --device cuda --out "$RESULTS")
SANITIZE=("$PYTHON" -m benchmarks.gpu.sanitize)

if [ -n "$DRY" ]; then
  step preflight 600 "$PYTHON" -m benchmarks.gpu.preflight --dry-run
  step build 600 "$PYTHON" setup.py build_ext --inplace --help
  step tests 600 "${PYTEST[@]}" --collect-only
  step sanitizer 600 "${SANITIZE[@]}" --device cpu
  step bench 600 "${BENCH[@]}" --seconds 1 --list
else
  step preflight 60 "$PYTHON" -m benchmarks.gpu.preflight
  step build 120 bash -c build
  step tests 150 "${PYTEST[@]}" --durations=10
  if command -v compute-sanitizer > /dev/null; then
    # Without torch's own pool every tensor is an allocation of its own, and its end is the end.
    step sanitizer 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      compute-sanitizer --tool memcheck --error-exitcode 86 "${SANITIZE[@]}" --device cuda
  else
    skip sanitizer "compute-sanitizer is not on PATH"
  fi
  # A case that has begun may compile for long; results are written after each.
  step bench $SECONDS_IN_ALL "${BENCH[@]}" --seconds $((SECONDS_IN_ALL - SECONDS - 45))
fi

if compgen -G "$RESULTS/*/*.csv" > /dev/null; then
  tar -czf "$OUT/results.tar.gz" --exclude=run -C "$RESULTS" .
fi
FAILED=()
{
  echo "| step | result | seconds | log |"
  echo "|---|---|---|---|"
  for i in "${!NAMES[@]}"; do
    echo "| ${NAMES[i]} | ${STATES[i]} | ${TIMES[i]} | ${NAMES[i]}.log |"
    [[ "${STATES[i]}" != FAILED* ]] || FAILED+=("${NAMES[i]}")
  done
  echo
  grep -E '^(\||results in)|^[a-z_]+ on ' "$OUT/bench.log" 2> /dev/null
  tail -n 3 "$OUT/tests.log" 2> /dev/null
  [ -z "$LEFT_OUT" ] || echo "tests left out, PyAV is not installed: $LEFT_OUT"
  echo
  echo "revision $BRIDGE_STG_REVISION, $SECONDS s in all; failed: ${FAILED[*]:-none}"
} > "$OUT/summary.md"
echo
cat "$OUT/summary.md"
[ ${#FAILED[@]} -eq 0 ]
