// Attention of one new token per row over the row's cache, for every row n and head h:
//
//   o = sum_i p_i v_i,  p = softmax over i <= position of (q . k_i / sqrt(K))
//
// Bytes: keys and values once, 4 K a position and head of theirs in bfloat16; q and o are nothing. Heads that share
// keys and values are neighbours in the grid: one reads them from memory, the others from the second-level cache. The
// scores are never stored: every group of lanes keeps a maximum, a sum and a weighted sum of its positions (online
// softmax).
//
// The positions of a (row, head) are shared out to 16, K/8 lanes to a position, in turns of 64 positions at K = 64.
// Each share is a warp of a block; where batch times heads are fewer than the multiprocessors, of a cluster of four
// blocks of four warps, which write into the first one's shared memory; where they are more, a warp has two shares,
// one after the other, so that a multiprocessor holds several blocks, some of which read while others add up. Every
// way the same lanes have the same positions and are put together in the same order, so a row's result does not
// depend on the batch, to the bit, and there are no atomics and no second kernel. What earlier steps wrote is fetched
// before the wait for this one's q, k and v.
#include <cmath>

#include "decode.cuh"

namespace mtlm {
namespace {

struct DecodeAttention {
  const void* q;            // [batch, heads, head size]
  const void* k_cache;      // [batch, positions, kv heads, head size], heads and their elements contiguous
  const void* v_cache;
  const int64_t* position;  // [batch]: the last one that is seen
  void* out;                // [batch, heads, head size]
  float scale;              // log2(e) / sqrt(head size)
  int pairs, kv_heads, group;  // of (row, head); how many neighbouring heads share one of keys and values
  int64_t cache_batch, cache_position;  // elements from row to row, from position to position
};

constexpr int ALL_SHARES = 16;  // of a (row, head)
constexpr int CLUSTER = 4;      // blocks of a (row, head) where there are few
constexpr int AT_ONCE = 4;      // positions of a lane that are in flight: 256 of a head at K = 64

__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Writes into the shared memory of the first block of the cluster, at the place that p has in ours.
__device__ __forceinline__ void write_to_first(float* p, float value) {
#if __CUDA_ARCH__ >= 900
  const unsigned here = static_cast<unsigned>(__cvta_generic_to_shared(p));
  unsigned there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(there) : "r"(here));
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(there), "f"(value) : "memory");
#endif
}

template <int SIZE, int BLOCKS, int SHARES>
__global__ __launch_bounds__(32 * ALL_SHARES / BLOCKS / SHARES) void attend(const __grid_constant__ DecodeAttention a) {
  constexpr int LANES = SIZE / 8, PER_WARP = 32 / LANES, TURN = ALL_SHARES * PER_WARP;
  constexpr int HERE = ALL_SHARES / BLOCKS / SHARES;  // warps of the block
  __shared__ float weighted[ALL_SHARES][SIZE];
  __shared__ float highest[ALL_SHARES], total[ALL_SHARES];
  if constexpr (BLOCKS > 1) cluster_arrive();  // a block is written to only once it runs
  launch_next();
  const int lane = threadIdx.x % 32, rank = blockIdx.x % BLOCKS;
  const int first_share = rank * SHARES * HERE + threadIdx.x / 32;
  const int part = lane % LANES, group = lane / LANES;
  const int pair = blockIdx.x / BLOCKS, kv_pair = pair / a.group, n = kv_pair / a.kv_heads;
  const int64_t position = read_fresh(a.position + n);
  const int64_t offset = n * a.cache_batch + kv_pair % a.kv_heads * SIZE + part * 8;
  const bf16* keys = static_cast<const bf16*>(a.k_cache) + offset;
  const bf16* values = static_cast<const bf16*>(a.v_cache) + offset;
  constexpr uint4 ZERO = {0, 0, 0, 0};
  uint4 k[AT_ONCE], v[AT_ONCE];
  const auto fetch = [&](int64_t first, int64_t end) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t at = first + i * TURN;
      k[i] = at < end ? read_fresh(keys + at * a.cache_position) : ZERO;
      v[i] = at < end ? read_fresh(values + at * a.cache_position) : ZERO;
    }
  };
  fetch(first_share * PER_WARP + group, position);
  wait_for_previous();
  float q[8];
  as_floats(read_fresh(static_cast<const bf16*>(a.q) + static_cast<int64_t>(pair) * SIZE + part * 8), q);
#pragma unroll
  for (int j = 0; j < 8; ++j) q[j] *= a.scale;
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (first_share * PER_WARP + group + i * TURN == position) {
      k[i] = read_fresh(keys + position * a.cache_position);
      v[i] = read_fresh(values + position * a.cache_position);
    }
  }
  const auto put = [](float* p, float x) {
    if constexpr (BLOCKS > 1) {
      write_to_first(p, x);
    } else {
      *p = x;
    }
  };
#pragma unroll 1
  for (int turn = 0; turn < SHARES; ++turn) {
    const int share = first_share + turn * HERE;
    const int64_t first = share * PER_WARP + group;
    float most = -INFINITY, sum = 0.f, out[8] = {};
    for (int64_t base = 0; base <= position; base += AT_ONCE * TURN) {
      float score[AT_ONCE];
      float now = most;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        score[i] = -INFINITY;
        if (SHARES > 1 && base + i * TURN > position) continue;  // of all lanes; one share's lanes would but wait
        float key[8], dot = 0.f;
        as_floats(k[i], key);
#pragma unroll
        for (int j = 0; j < 8; ++j) dot = fmaf(q[j], key[j], dot);
        dot = sum_over_lanes<LANES>(dot);
        if (base + first + i * TURN <= position) score[i] = dot;
        now = fmaxf(now, score[i]);
        const int64_t next = base + first + (AT_ONCE + i) * TURN;
        if (next <= position) k[i] = read_fresh(keys + next * a.cache_position);
      }
      const float against = now == -INFINITY ? 0.f : now;  // a lane without positions yet
      const float shrink = exp2f(most - against);
      sum *= shrink;
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] *= shrink;
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (SHARES > 1 && base + i * TURN > position) continue;
        float value[8];
        as_floats(v[i], value);
        const float p = exp2f(score[i] - against);
        sum = __fadd_rn(sum, p);  // no fma: bits would depend on how many shares a warp has
#pragma unroll
        for (int j = 0; j < 8; ++j) out[j] = fmaf(p, value[j], out[j]);
        const int64_t next = base + first + (AT_ONCE + i) * TURN;
        if (next <= position) v[i] = read_fresh(values + next * a.cache_position);
      }
      most = now;
    }
    if (turn + 1 < SHARES) fetch(first + HERE * PER_WARP, position + 1);  // while this share's sums are put together
    // The groups of lanes of a warp, then the warps, in order.
    float now = most;
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, offset));
    const float shrink = now == -INFINITY ? 0.f : exp2f(most - now);
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < 8; ++j) out[j] *= shrink;
#pragma unroll
    for (int offset = LANES; offset < 32; offset *= 2) {
      sum += __shfl_xor_sync(ALL_LANES, sum, offset);
#pragma unroll
      for (int j = 0; j < 8; ++j) out[j] += __shfl_xor_sync(ALL_LANES, out[j], offset);
    }
    if constexpr (BLOCKS > 1) cluster_wait();
    if (lane < LANES) {
#pragma unroll
      for (int j = 0; j < 8; ++j) put(&weighted[share][part * 8 + j], out[j]);
      if (lane == 0) {
        put(&highest[share], now);
        put(&total[share], sum);
      }
    }
  }
  if constexpr (BLOCKS > 1) {
    cluster_arrive();
    cluster_wait();
    if (rank != 0) return;
  } else {
    __syncthreads();
  }
  float top = highest[0];
#pragma unroll
  for (int w = 1; w < ALL_SHARES; ++w) top = fmaxf(top, highest[w]);
  for (int i = threadIdx.x; i < SIZE; i += 32 * HERE) {
    float all = 0.f, mean = 0.f;
#pragma unroll
    for (int w = 0; w < ALL_SHARES; ++w) {
      const float weight = exp2f(highest[w] - top);  // 0 for a warp without positions
      all = fmaf(weight, total[w], all);
      mean = fmaf(weight, weighted[w][i], mean);
    }
    static_cast<bf16*>(a.out)[static_cast<int64_t>(pair) * SIZE + i] = from_float<bf16>(mean / all);
  }
}

template <int SIZE, int BLOCKS, int SHARES>
cudaError_t launch(const DecodeAttention& a, cudaStream_t stream) {
  constexpr int THREADS = 32 * ALL_SHARES / BLOCKS / SHARES;
  return launch_chained(attend<SIZE, BLOCKS, SHARES>, a, a.pairs * BLOCKS, THREADS, BLOCKS, stream);
}

template <int SIZE>
cudaError_t by_size(const DecodeAttention& a, cudaStream_t stream) {
  if (a.pairs < multiprocessors()) {
    const bool clusters = has_early_launch(attend<SIZE, CLUSTER, 1>);
    return clusters ? launch<SIZE, CLUSTER, 1>(a, stream) : launch<SIZE, 1, 1>(a, stream);
  }
  return launch<SIZE, 1, 2>(a, stream);
}

}  // namespace

cudaError_t decode_attention_(cudaStream_t stream, View q, View k_cache, View v_cache, View position, Out out) {
  const int batch = check_batch(q, "q");
  const int64_t width = q.sizes[1];
  check_dense(q, "q", q, {batch, width});
  check_dense(out, "out", q, {batch, width});
  check_caches(k_cache, v_cache, q);
  check(position, "position", q, {batch}, Type::int64);
  const int64_t size = k_cache.sizes[3];
  DecodeAttention a = {};
  a.q = q.data, a.k_cache = k_cache.data, a.v_cache = v_cache.data, a.out = out.out();
  a.position = position.as<int64_t>();
  a.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(size)));
  a.pairs = static_cast<int>(batch * width / size), a.kv_heads = static_cast<int>(k_cache.sizes[2]);
  a.group = a.pairs / (batch * a.kv_heads);
  a.cache_batch = k_cache.strides[0], a.cache_position = k_cache.strides[1];
  cudaError_t error = cudaSuccess;
  const bool known = dispatch<32, 64, 128>(size, [&](auto of) { error = by_size<decltype(of)::value>(a, stream); });
  REQUIRE(known, "the head size must be 32, 64 or 128, not ", size);
  return error;
}

}  // namespace mtlm
