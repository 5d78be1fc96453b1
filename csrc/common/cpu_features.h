// Which SIMD level the kernels use: what the processor offers, or less where the environment asks for it.
#pragma once

namespace bridge_stg {

enum class SimdLevel { kScalar = 0, kAvx2 = 1, kAvx512 = 2 };

// The level in use, decided once: the best that the processor has, at most BRIDGE_STG_SIMD=scalar|avx2|avx512.
// kAvx512 means F, BW, VL, DQ and VBMI.
SimdLevel simd_level();

const char* simd_name(SimdLevel level);

}  // namespace bridge_stg
