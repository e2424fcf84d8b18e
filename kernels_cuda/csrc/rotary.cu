// Rotary embedding in the half-split layout (Su et al. 2021): element i of a head turns with element i + K/2.
//
//   a' = a cos - b sin        b' = b cos + a sin        conjugate: the same with -sin, which is the gradient
//
// q and k in place, as views of a packed [batch, seq, 3, heads, K] or on their own: 8d bytes a token in bfloat16.
// Or from separate q, k, v into a packed one, v copied: the gradients of attention are turned back and put
// where the projection's gradient is read, in one pass of 12d bytes. Nothing is saved but cos and sin; every
// element is computed alone, so results are the same whatever the batch.
#include "common.cuh"
#include "kernels.h"

namespace mtlm {
namespace {

constexpr int THREADS = 256;

// blockIdx.y: which of q, k, v. A block takes as many tokens as fill its threads; a thread N elements of both
// halves of one head.
template <typename T, int N>
__global__ __launch_bounds__(THREADS) void rotate(const __grid_constant__ Rotary a, int tokens_per_block) {
  const HeadsView& view = a.views[blockIdx.y];
  const int chunks = a.half / N;
  const int items = a.heads * chunks;
  const int slot = threadIdx.x / items;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * tokens_per_block + slot;
  if (slot >= tokens_per_block || token >= a.batch * a.seq) return;
  const int64_t batch = token / a.seq, position = token % a.seq;
  const T* src = static_cast<const T*>(view.src) + batch * view.src_batch + position * view.src_seq;
  T* dst = static_cast<T*>(view.dst) + batch * view.dst_batch + position * view.dst_seq;
  const int64_t angles = batch * a.angle_batch + position * a.half;
  // More items than threads (many heads) are taken in turns; else this runs once.
  const int stride = tokens_per_block == 1 ? THREADS : items;
  for (int item = threadIdx.x - slot * items; item < items; item += stride) {
    const int head = item / chunks, i = item % chunks * N;
    float x[N], y[N];
    load<T, N>(src + head * view.src_head + i, x);
    load<T, N>(src + head * view.src_head + i + a.half, y);
    if (blockIdx.y < 2) {
      float cos[N], sin[N];
      load<float, N, Read::constant>(a.cos + angles + i, cos);
      load<float, N, Read::constant>(a.sin + angles + i, sin);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float s = a.conjugate ? -sin[j] : sin[j];
        const float turned = x[j] * cos[j] - y[j] * s;
        y[j] = y[j] * cos[j] + x[j] * s;
        x[j] = turned;
      }
    }
    store<T, N>(dst + head * view.dst_head + i, x);
    store<T, N>(dst + head * view.dst_head + i + a.half, y);
  }
}

bool vectors(const HeadsView& v, int64_t size) {
  const int64_t strides = v.src_batch | v.src_seq | v.src_head | v.dst_batch | v.dst_seq | v.dst_head;
  return aligned(v.src, 16) && aligned(v.dst, 16) && strides * size % 16 == 0;
}

template <typename T, int N>
cudaError_t launch(const Rotary& a, cudaStream_t stream) {
  const int items = a.heads * (a.half / N);
  const int per_block = items < THREADS ? THREADS / items : 1;
  const int64_t blocks = (a.batch * a.seq + per_block - 1) / per_block;
  rotate<T, N><<<dim3(static_cast<unsigned>(blocks), a.count), THREADS, 0, stream>>>(a, per_block);
  return cudaGetLastError();
}

template <typename T>
cudaError_t typed(const Rotary& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  bool whole = a.half % N == 0 && aligned(a.cos, 16) && aligned(a.sin, 16) && a.angle_batch % 4 == 0;
  for (int i = 0; i < a.count; ++i) whole = whole && vectors(a.views[i], sizeof(T));
  return whole ? launch<T, N>(a, stream) : launch<T, 1>(a, stream);
}

}  // namespace

cudaError_t rotary(const Rotary& a, Type type, cudaStream_t stream) {
  if (a.batch * a.seq * a.heads * a.half == 0) return cudaSuccess;
  return type == Type::bfloat16 ? typed<bf16>(a, stream) : typed<float>(a, stream);
}

}  // namespace mtlm
