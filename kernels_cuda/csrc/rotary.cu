// Rotary embedding in the half-split layout (Su et al. 2021): element i of a head rotates with element i + K/2.
//
//   a' = a cos - b sin        b' = b cos + a sin        conjugate: the same with -sin, which is the gradient
//
// q and k in place, as views of a packed [batch, seq, 3, heads, K] or on their own: 8d bytes per token in bfloat16.
// Or from separate q, k, v into a packed one, v copied: the gradients of attention are rotated back and put
// where the projection's gradient is read, in one pass of 12d bytes. Nothing is saved but cos and sin; every
// element is computed alone, so results are the same whatever the batch.
#include "common.cuh"

namespace mtlm {
namespace {

constexpr int THREADS = 256;

// One of q, k, v: [batch, seq, heads, head size], the last contiguous. In place where src is dst.
struct HeadsView {
  const void* src;
  int64_t src_batch, src_seq, src_head;
  void* dst;
  int64_t dst_batch, dst_seq, dst_head;
};

struct Rotary {
  HeadsView views[3];   // q, k and, to be copied, v
  int count;            // how many of them: 2 or 3
  const float* cos;     // [1 or batch, seq, head size / 2]
  const float* sin;
  int64_t angle_batch;  // elements from batch to batch of cos and sin, 0 for one of all
  int64_t batch, seq;
  int heads, half;
  bool conjugate;
};

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

cudaError_t rotary(const Rotary& a, Type type, cudaStream_t stream) {
  if (a.batch * a.seq * a.heads * a.half == 0) return cudaSuccess;
  return type == Type::bfloat16 ? typed<bf16>(a, stream) : typed<float>(a, stream);
}

// Everything but the views, and the checks that both ops share.
Rotary arguments(const View& q, const View& cos, const View& sin, bool conjugate) {
  REQUIRE(q.dims == 4, "q must be [batch, seq, heads, head size], not ", shape(q));
  const int64_t batch = q.sizes[0], seq = q.sizes[1], heads = q.sizes[2], size = q.sizes[3];
  REQUIRE(size % 2 == 0, "the head size must be even, not ", size);
  REQUIRE(batch * seq <= MOST_BLOCKS && heads * size <= MOST_BLOCKS, "q of shape ", shape(q), " has more than ",
          MOST_BLOCKS, " tokens or elements per token");
  const int64_t angles = cos.dims == 3 ? cos.sizes[0] : 0;
  REQUIRE(angles == 1 || angles == batch, "cos must be [1 or ", batch, ", ", seq, ", ", size / 2, "], not ",
          shape(cos));
  check(cos, "cos", q, {angles, seq, size / 2}, Type::float32);
  check(sin, "sin", q, {angles, seq, size / 2}, Type::float32);
  Rotary a = {};
  a.cos = cos.as<float>(), a.sin = sin.as<float>();
  a.angle_batch = angles == 1 ? 0 : seq * (size / 2);
  a.batch = batch, a.seq = seq;
  a.heads = static_cast<int>(heads), a.half = static_cast<int>(size / 2);
  a.conjugate = conjugate;
  return a;
}

// Of q, k or v, into `to` and the strides of the three dimensions before a head's elements.
HeadsView heads(const View& t, const char* name, const View& q, void* to, int64_t batch, int64_t seq, int64_t head) {
  check(t, name, q, {q.sizes[0], q.sizes[1], q.sizes[2], q.sizes[3]});
  check_rows_contiguous(t, name);
  REQUIRE(t.type == q.type, name, " must be ", name_of(q.type), " as q is, not ", name_of(t.type));
  return {t.data, t.strides[0], t.strides[1], t.strides[2], to, batch, seq, head};
}

}  // namespace

cudaError_t rotary_(cudaStream_t stream, Out q, Out k, View cos, View sin, bool conjugate) {
  Rotary a = arguments(q, cos, sin, conjugate);
  a.views[0] = heads(q, "q", q, q.out(), q.strides[0], q.strides[1], q.strides[2]);
  a.views[1] = heads(k, "k", q, k.out(), k.strides[0], k.strides[1], k.strides[2]);
  a.count = 2;
  return rotary(a, float_type(q, "q"), stream);
}

cudaError_t rotary_pack_into(cudaStream_t stream, View q, View k, View v, View cos, View sin, bool conjugate,
                             Out packed) {
  Rotary a = arguments(q, cos, sin, conjugate);
  const Type type = float_type(q, "q");
  const int64_t head = q.sizes[3], part = q.sizes[2] * head, token = 3 * part;
  check(packed, "packed", q, {q.sizes[0], q.sizes[1], 3, q.sizes[2], head}, type);
  const int64_t bytes = part * (type == Type::bfloat16 ? 2 : 4);
  const View* const parts[] = {&q, &k, &v};
  const char* const names[] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    a.views[i] = heads(*parts[i], names[i], q, packed.out<char>() + i * bytes, q.sizes[1] * token, token, head);
  }
  a.count = 3;
  return rotary(a, type, stream);
}

}  // namespace mtlm
