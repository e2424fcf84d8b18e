// RMSNorm of every new query and key over its head, then rotation, in place, for models that norm them (Qwen3):
//
//   x = rotate(x w / sqrt(mean(x^2) + eps)),  mean over the head's K elements
//
// The products before it (decode_project.cu) share a head out to K / 16 blocks, so that even few rows of weights are
// spread over the multiprocessors. A norm needs the whole head, so it is a kernel of its own between them and
// attention: it costs a launch of the chain, and only the models that need it have it. Within attention, every head of
// a group would norm its key again, from a third place, since the cache must hold normed keys.
//
// Bytes: q and the new keys once, read and written: nothing. K/8 lanes have a head, 8 neighbouring elements each; the
// other element of a rotated pair is K/16 lanes away. The sum of squares is a butterfly over the head's lanes: a head's
// result depends on nothing else.
#include "decode.cuh"

namespace mtlm {
namespace {

constexpr int THREADS = 128;

struct DecodeQkNorm {
  const void* q_norm;       // [head size]
  const void* k_norm;
  float eps;
  const float* cos;         // [positions, head size / 2] or null: nothing is rotated
  const float* sin;
  const int64_t* position;  // [batch]
  void* q;                  // [batch, heads, head size]
  void* k_cache;            // [batch, positions, kv heads, head size], heads and their elements contiguous
  int batch, heads, kv_heads;
  int64_t cache_batch, cache_position;  // elements from row to row, from position to position
};

template <int SIZE>
__global__ __launch_bounds__(THREADS) void norm_and_rotate(const __grid_constant__ DecodeQkNorm a) {
  constexpr int LANES = SIZE / 8;
  launch_next();
  const int item = (blockIdx.x * THREADS + threadIdx.x) / LANES, part = threadIdx.x % LANES;
  const int all_heads = a.heads + a.kv_heads;
  const bool there = item < a.batch * all_heads;
  const int n = there ? item / all_heads : 0, head = there ? item % all_heads : 0;
  const bool of_q = head < a.heads, low = part < LANES / 2;  // of a rotated pair
  const int64_t position = read_fresh(a.position + n);
  float weight[8], cos[8], sin[8];
  as_floats(read_fresh(static_cast<const bf16*>(of_q ? a.q_norm : a.k_norm) + part * 8), weight);
  if (a.cos != nullptr) {
    const int64_t angle = position * (SIZE / 2) + part % (LANES / 2) * 8;
    load<float, 8, Read::constant>(a.cos + angle, cos);
    load<float, 8, Read::constant>(a.sin + angle, sin);
  }
  bf16* x = of_q ? static_cast<bf16*>(a.q) + (static_cast<int64_t>(n) * a.heads + head) * SIZE
                 : static_cast<bf16*>(a.k_cache) + n * a.cache_batch + position * a.cache_position +
                       (head - a.heads) * SIZE;
  x += part * 8;
  wait_for_previous();
  float value[8], square = 0.f;
  as_floats(read_fresh(x), value);
#pragma unroll
  for (int j = 0; j < 8; ++j) square = fmaf(value[j], value[j], square);
  const float factor = rsqrtf(sum_over_lanes<LANES>(square) / SIZE + a.eps);
#pragma unroll
  for (int j = 0; j < 8; ++j) value[j] = rounded<bf16>(value[j] * factor * weight[j]);  // as a model stores it
  if (a.cos != nullptr) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float other = __fmul_rn(__shfl_xor_sync(ALL_LANES, value[j], LANES / 2), sin[j]);
      value[j] = __fmaf_rn(value[j], cos[j], low ? -other : other);
    }
  }
  if (there) store<bf16, 8>(x, value);
}

}  // namespace

cudaError_t decode_qk_norm_(cudaStream_t stream, View q_norm, View k_norm, double eps, std::optional<View> cos,
                            std::optional<View> sin, View position, Out q, Out k_cache) {
  DecodeQkNorm a = {};
  a.batch = check_batch(q, "q");
  check_dense(q, "q", q, {a.batch, q.sizes[1]});
  check_caches(k_cache, k_cache, q);
  const int64_t kv_heads = k_cache.sizes[2], size = k_cache.sizes[3];
  check_dense(q_norm, "q_norm", q, {size});
  check_dense(k_norm, "k_norm", q, {size});
  check(position, "position", q, {a.batch}, Type::int64);
  check_angles(cos, sin, k_cache);
  a.q_norm = q_norm.data, a.k_norm = k_norm.data;
  a.eps = static_cast<float>(eps);
  if (cos) a.cos = cos->as<float>(), a.sin = sin->as<float>();
  a.position = position.as<int64_t>();
  a.q = q.out(), a.k_cache = k_cache.out();
  a.heads = static_cast<int>(q.sizes[1] / size), a.kv_heads = static_cast<int>(kv_heads);
  a.cache_batch = k_cache.strides[0], a.cache_position = k_cache.strides[1];
  const int64_t lanes = a.batch * (a.heads + a.kv_heads) * (size / 8), blocks = (lanes + THREADS - 1) / THREADS;
  cudaError_t error = cudaSuccess;
  const bool known = dispatch<32, 64, 128>(size, [&](auto of) {
    error = launch_chained(norm_and_rotate<decltype(of)::value>, a, blocks, THREADS, 1, stream);
  });
  REQUIRE(known, "the head size must be 32, 64 or 128, not ", size);
  return error;
}

}  // namespace mtlm
