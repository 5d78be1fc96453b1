#include "common/simd_scalar.h"
#include "attend_memory/kernels-inl.h"

namespace bridge_stg {

template <>
const AttendKernels KernelsOf<AttendKernels>::scalar = kKernels;

}  // namespace bridge_stg
