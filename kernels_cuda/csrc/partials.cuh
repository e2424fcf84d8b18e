// Column sums of the partial sums that the blocks or warps of a kernel leave. No atomics: always in the same order.
#pragma once

#include "common.cuh"

namespace mtlm {

// out [d] = the sum of partials [count, d]; a block has 32 columns, GROUPS threads a column, which read AT_ONCE.
template <int GROUPS, int AT_ONCE>
__global__ __launch_bounds__(32 * GROUPS) void add_partials(const float* partials, int64_t count, int64_t d, void* out,
                                                            bool out_bf16) {
  __shared__ float part[GROUPS][32];
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  const int group = threadIdx.x / 32;
  float total = 0;
  if (column < d) {
#pragma unroll AT_ONCE
    for (int64_t p = group; p < count; p += GROUPS) total += partials[p * d + column];
  }
  part[group][threadIdx.x % 32] = total;
  __syncthreads();
  if (group != 0 || column >= d) return;
#pragma unroll
  for (int g = 1; g < GROUPS; ++g) total += part[g][threadIdx.x];
  if (out_bf16) {
    static_cast<bf16*>(out)[column] = from_float<bf16>(total);
  } else {
    static_cast<float*>(out)[column] = total;
  }
}

template <int GROUPS, int AT_ONCE = 4>
cudaError_t launch_add_partials(cudaStream_t stream, const float* partials, int64_t count, int64_t d, void* out,
                                bool out_bf16) {
  add_partials<GROUPS, AT_ONCE>
      <<<static_cast<unsigned>((d + 31) / 32), 32 * GROUPS, 0, stream>>>(partials, count, d, out, out_bf16);
  return cudaGetLastError();
}

}  // namespace mtlm
