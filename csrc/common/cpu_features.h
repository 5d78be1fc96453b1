// Which SIMD level the kernels use: what the processor offers, or less where the environment asks for it.
#pragma once

namespace bridge_stg {

enum class SimdLevel { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The level in use, decided once: the best that the processor has, at most BRIDGE_STG_SIMD=scalar|avx2|avx512.
// kAvx512 means F, BW, VL, DQ and VBMI.
SimdLevel simd_level();

const char* simd_name(SimdLevel level);

// The table of an op's kernels at each level. An op's kernels.h declares its three, and its kernels_<level>.cpp, the
// one file that is compiled with the flags of the level, defines one of them.
template <typename Kernels>
struct KernelsOf {
  static const Kernels scalar, avx2, avx512;
};

template <typename Kernels>
const Kernels& kernels_of(SimdLevel level) {
#if defined(__x86_64__)
  if (level == SimdLevel::kAvx512) return KernelsOf<Kernels>::avx512;
  if (level == SimdLevel::kAvx2) return KernelsOf<Kernels>::avx2;
#endif
  (void)level;
  return KernelsOf<Kernels>::scalar;
}

}  // namespace bridge_stg
