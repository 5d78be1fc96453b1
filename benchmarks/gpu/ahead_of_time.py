"""Compiles Triton kernels for GPUs that are not here, and reads what they use.

Works on kernels decorated without TRITON_INTERPRET.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, KernelParam

ARCHITECTURES = (80, 90, 100)

_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint32: "*u32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Variant:
    """One way to compile a kernel.

    Attributes:
        name: names it in the table; unique within an op.
        kernel: the `@triton.jit` function.
        signature: Triton type of every argument, "constexpr" where it is one; a tuple of types for a tuple.
        constants: value of every "constexpr", by its path: the place of the argument, then that within a tuple.
        aligned: paths of the arguments that are multiples of 16; the plain variant ignores them.
        options: num_warps and num_stages.
    """

    name: str
    kernel: JITFunction
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    aligned: tuple[tuple[int, ...], ...] = ()
    options: Mapping[str, int] = field(default_factory=dict)

    def plain(self) -> Variant:
        """The same without the hint of alignment, which costs it `cp.async` and wide loads."""
        return Variant(f"{self.name}/plain", self.kernel, self.signature, self.constants, (), self.options)


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel uses: registers a thread, bytes, columns of tensor memory; whether its code traps."""

    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    has_trap: bool


def variant_of(name: str, kernel: JITFunction, args: tuple[Any, ...], options: Mapping[str, Any]) -> Variant:
    """The variant that `kernel[grid](*args, **options)` compiles, from tensors of any device, meta included."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {key: value for key, value in options.items() if key in kernel.arg_names}
    for parameter in kernel.params:
        if parameter.name not in values and parameter.has_default:
            values[parameter.name] = parameter.default
    signature, constants, aligned = {}, {}, []

    def type_of(path: tuple[int, ...], parameter: KernelParam, value: Any) -> Any:
        specialised = not parameter.do_not_specialize
        if isinstance(value, tuple):
            return tuple(type_of((*path, place), parameter, part) for place, part in enumerate(value))
        if isinstance(value, torch.Tensor):
            aligned.append(path)
            return _POINTERS[value.dtype]
        if parameter.is_constexpr or value is None or (specialised and isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if specialised and value % 16 == 0:
            aligned.append(path)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for place, parameter in enumerate(kernel.params):
        signature[parameter.name] = type_of((place,), parameter, values[parameter.name])
    launch = {key: value for key, value in options.items() if key in _LAUNCH_OPTIONS}
    return Variant(name, kernel, signature, constants, tuple(aligned), launch)


def record(launch: Callable[[], Any], name: str = "") -> list[Variant]:
    """The variants of all kernels that `launch` launches, none of which runs; named `<name>/<kernel>`."""
    found: list[Variant] = []

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(variant_of(f"{name}/{self.__name__}".lstrip("/"), self, args, options))

    original = JITFunction.run
    JITFunction.run = run
    try:
        launch()
    finally:
        JITFunction.run = original
    return found


def compile_kernel(variant: Variant, cc: int) -> Any:
    """Triton's compiled kernel for compute capability `cc` (80, 90, 100): `asm["cubin"]`, `asm["ptx"]`, `metadata`."""
    attributes = {path: [["tt.divisibility", 16]] for path in variant.aligned}
    source = ASTSource(variant.kernel, dict(variant.signature), dict(variant.constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", cc, 32), options=dict(variant.options))


def compile_variant(variant: Variant, cc: int) -> Resources:
    """Compile for compute capability `cc` and read the resources out of the cubin."""
    compiled = compile_kernel(variant, cc)
    usage = read_cubin(compiled.asm["cubin"])
    return Resources(
        registers=int(usage["REG"]),
        stack=int(usage["STACK"]),
        local=int(usage["LOCAL"]),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        # Not in the machine code: there ptxas guards every use of tensor memory by a trap.
        has_trap=re.search(r"\btrap\b", compiled.asm["ptx"]) is not None,
    )


def read_cubin(cubin: bytes) -> dict[str, str]:
    """Resource usage by name of the one kernel in a cubin."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"aot-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        dump = subprocess.run(
            [_CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True
        ).stdout
    finally:
        path.unlink()
    usage = re.findall(r"^\s*(REG:.*)$", dump, re.MULTILINE)
    assert len(usage) == 1, f"one kernel expected in a cubin, got {len(usage)}"
    return dict(re.findall(r"(\w+):(\d+)", usage[0]))


def distinct(variants: list[Variant]) -> list[Variant]:
    """The variants that compile to different code, each once; a second of the same name gets a number."""
    found: dict[Any, Variant] = {}
    for variant in variants:
        key = (
            variant.kernel.fn.__name__,
            tuple(variant.signature.items()),
            tuple((name, repr(value)) for name, value in variant.constants.items()),
            variant.aligned,
            tuple(variant.options.items()),
        )
        found.setdefault(key, variant)
    names: dict[str, int] = {}
    result = []
    for variant in found.values():
        names[variant.name] = count = names.get(variant.name, 0) + 1
        result.append(variant if count == 1 else replace(variant, name=f"{variant.name}-{count}"))
    return result
