// The CUDA kernel of patchify_frames. One thread block computes a tile, and one launch all tiles of some videos.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "patchify_frames/patchify_tile.h"

namespace bridge_stg {

// The videos of a launch, as many as fit the 4 KiB of a kernel's arguments. Passed by value they need no copy to the
// device, and a captured graph keeps them.
constexpr int kVideosAtOnce = 24;

struct TileJob {
  TileVideo videos[kVideosAtOnce];
  int count;
  PatchLayout layout;
  TileNormalization normalization;
  bool bicubic;
};
static_assert(sizeof(TileJob) <= 4000);

__device__ __forceinline__ void store_as(float* out, float value) { *out = value; }
__device__ __forceinline__ void store_as(__nv_bfloat16* out, float value) { *out = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store_as(__half* out, float value) { *out = __float2half_rn(value); }

// 7 warps fit the 196 pixels of a patch of 14 best, 8 warps the 256 pixels of a patch of 16.
constexpr int tile_threads(int patch) { return patch == 14 ? 224 : 256; }

template <typename Value, int kPatch>
__global__ void __launch_bounds__(tile_threads(kPatch), 4)
    patchify_kernel(const __grid_constant__ TileJob job, Value* __restrict__ out) {
  extern __shared__ float shared[];
  int video = 0;
  while (video + 1 < job.count && job.videos[video + 1].first_block <= blockIdx.x) ++video;
  const auto store = [out](int64_t position, float value) { store_as(out + position, value); };
  const auto barrier = [] { __syncthreads(); };
  patchify_tile<kPatch>(job.videos[video], job.layout, job.normalization, job.bicubic,
                        blockIdx.x - job.videos[video].first_block, shared, threadIdx.x, blockDim.x, store, barrier);
}

}  // namespace bridge_stg
