#include "common/cpu_features.h"

#include <cstdlib>
#include <string_view>

namespace bridge_stg {
namespace {

SimdLevel supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi");
  if (avx2 && avx512) return SimdLevel::kAvx512;
  if (avx2) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kScalar;
}

SimdLevel decide() {
  const SimdLevel best = supported();
  const char* wish = std::getenv("BRIDGE_STG_SIMD");
  if (wish == nullptr) return best;
  for (SimdLevel level : {SimdLevel::kScalar, SimdLevel::kAvx2, SimdLevel::kAvx512}) {
    if (std::string_view(wish) == simd_name(level)) return level < best ? level : best;
  }
  return best;
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = decide();
  return level;
}

const char* simd_name(SimdLevel level) {
  switch (level) {
    case SimdLevel::kAvx512:
      return "avx512";
    case SimdLevel::kAvx2:
      return "avx2";
    default:
      return "scalar";
  }
}

}  // namespace bridge_stg
