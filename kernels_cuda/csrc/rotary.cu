// Rotary embedding in the half-split layout (Su et al. 2021): element i of a head rotates with element i + K/2.
//
//   a' = a cos - b sin        b' = b cos + a sin        conjugate: the same with -sin, which is the gradient
//
// q and k in place, as views of a packed product or on their own: 8d bytes per token in bfloat16. Or out of a packed
// product into separate q, k and v, v copied, and from their gradients back into a packed one: 12d bytes, in one pass;
// without angles, q and k are copied too. Nothing is saved but cos and sin; every element is computed alone, so
// results are the same whatever the batch.
//
// A thread takes 16 bytes of both halves of up to four heads of one token, and keeps their angles in registers: 64
// bytes of cos and sin are read for 128 of q instead of for 32, from 73% to 90% of a copy on an H200.
#include "angles.cuh"
#include "common.cuh"

#include <algorithm>

namespace mtlm {
namespace {

constexpr int THREADS = 256;
constexpr int HEADS = 4;  // of a thread

// One of q, k, v: [batch, seq, heads, head size], the last contiguous. In place where src is dst.
struct HeadsView {
  const void* src;
  int64_t src_batch, src_seq, src_head;
  void* dst;
  int64_t dst_batch, dst_seq, dst_head;
  int heads;
};

struct Rotary {
  HeadsView views[3];   // q, k and, to be copied, v
  int count;            // how many of them: 2 or 3
  const float* cos;     // [1 or batch, seq, head size / 2]; null: nothing is rotated
  const float* sin;
  int64_t angle_batch;  // elements from batch to batch of cos and sin, 0 for one of all
  int64_t batch, seq;
  int half;
  bool conjugate;
};

// N elements as they lie in memory: 16 bytes, or a single one.
template <typename T, int N>
struct Chunk {
  using Bits = std::conditional_t<N == 1, T, uint4>;
  Bits bits;

  __device__ __forceinline__ void load(const T* p) { bits = *reinterpret_cast<const Bits*>(p); }

  __device__ __forceinline__ void store(T* p) const {
    if constexpr (N == 1) {
      *p = bits;
    } else {
      __stcg(reinterpret_cast<uint4*>(p), bits);
    }
  }

  __device__ __forceinline__ void unpack(float (&out)[N]) const {
    if constexpr (N == 1) {
      out[0] = to_float(bits);
    } else {
      const unsigned word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
          out[2 * i] = __uint_as_float(word[i] << 16);
          out[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
        } else {
          out[i] = __uint_as_float(word[i]);
        }
      }
    }
  }

  __device__ __forceinline__ void pack(const float (&in)[N]) {
    if constexpr (N == 1) {
      bits = from_float<T>(in[0]);
    } else if constexpr (sizeof(T) == 2) {
      bits = {pack_bf16(in[0], in[1]), pack_bf16(in[2], in[3]), pack_bf16(in[4], in[5]), pack_bf16(in[6], in[7])};
    } else {
      bits = {__float_as_uint(in[0]), __float_as_uint(in[1]), __float_as_uint(in[2]), __float_as_uint(in[3])};
    }
  }
};

// blockIdx.y: which of q, k, v. Neighbouring threads take neighbouring chunks of a head, then other heads, then other
// tokens. A thread's heads are `groups` apart.
template <typename T, int N>
__global__ __launch_bounds__(THREADS) void rotate(const __grid_constant__ Rotary a) {
  const HeadsView& view = a.views[blockIdx.y];
  const int chunks = a.half / N, groups = (view.heads + HEADS - 1) / HEADS;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  const int i = static_cast<int>(item % chunks) * N;
  const int group = static_cast<int>(item / chunks % groups);
  const int64_t token = item / chunks / groups;
  if (token >= a.batch * a.seq) return;
  const int64_t batch = token / a.seq, position = token % a.seq;
  const T* src = static_cast<const T*>(view.src) + batch * view.src_batch + position * view.src_seq + i;
  T* dst = static_cast<T*>(view.dst) + batch * view.dst_batch + position * view.dst_seq + i;
  Chunk<T, N> x[HEADS], y[HEADS];
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const int head = group + h * groups;
    if (head >= view.heads) continue;
    x[h].load(src + head * view.src_head);
    y[h].load(src + head * view.src_head + a.half);
  }
  if (blockIdx.y < 2 && a.cos != nullptr) {
    float cos[N], sin[N];
    const int64_t angles = batch * a.angle_batch + position * a.half + i;
    load<float, N, Read::constant>(a.cos + angles, cos);
    load<float, N, Read::constant>(a.sin + angles, sin);
    if (a.conjugate) {
#pragma unroll
      for (int j = 0; j < N; ++j) sin[j] = -sin[j];
    }
#pragma unroll
    for (int h = 0; h < HEADS; ++h) {
      float u[N], v[N];
      x[h].unpack(u);
      y[h].unpack(v);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float2 both = turned(u[j], v[j], cos[j], sin[j]);
        u[j] = both.x, v[j] = both.y;
      }
      x[h].pack(u);
      y[h].pack(v);
    }
  }
#pragma unroll
  for (int h = 0; h < HEADS; ++h) {
    const int head = group + h * groups;
    if (head >= view.heads) continue;
    x[h].store(dst + head * view.dst_head);
    y[h].store(dst + head * view.dst_head + a.half);
  }
}

bool vectors(const HeadsView& v, int64_t size) {
  const int64_t strides = v.src_batch | v.src_seq | v.src_head | v.dst_batch | v.dst_seq | v.dst_head;
  return aligned(v.src, 16) && aligned(v.dst, 16) && strides * size % 16 == 0;
}

template <typename T, int N>
cudaError_t launch(const Rotary& a, cudaStream_t stream) {
  int heads = 0;
  for (int i = 0; i < a.count; ++i) heads = std::max(heads, a.views[i].heads);
  const int64_t items = a.batch * a.seq * (a.half / N) * ((heads + HEADS - 1) / HEADS);
  const int64_t blocks = (items + THREADS - 1) / THREADS;
  REQUIRE(blocks <= MOST_BLOCKS, "q, k and v have more elements than a grid of ", MOST_BLOCKS, " blocks takes");
  rotate<T, N><<<dim3(static_cast<unsigned>(blocks), a.count), THREADS, 0, stream>>>(a);
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
  if (a.batch * a.seq * a.half == 0) return cudaSuccess;
  return type == Type::bfloat16 ? typed<bf16>(a, stream) : typed<float>(a, stream);
}

// Everything but the views, and the checks that all ops share.
Rotary arguments(const View& q, const std::optional<View>& cos, const std::optional<View>& sin, bool conjugate) {
  REQUIRE(q.dims == 4, "q must be [batch, seq, heads, head size], not ", shape(q));
  const int64_t batch = q.sizes[0], seq = q.sizes[1], heads = q.sizes[2], size = q.sizes[3];
  REQUIRE(size % 2 == 0, "the head size must be even, not ", size);
  REQUIRE(batch * seq <= MOST_BLOCKS && heads * size <= MOST_BLOCKS, "q of shape ", shape(q), " has more than ",
          MOST_BLOCKS, " tokens or elements per token");
  Rotary a = {};
  a.batch = batch, a.seq = seq;
  a.half = static_cast<int>(size / 2);
  a.conjugate = conjugate;
  const Angles angles = checked_angles(cos, sin, q);
  a.cos = angles.cos, a.sin = angles.sin;
  a.angle_batch = angles.batch == 1 ? 0 : seq * (size / 2);
  return a;
}

// q, k or v, its number of heads its own; in place.
HeadsView heads(const View& t, const char* name, const View& q) {
  const int64_t own = t.dims == 4 ? t.sizes[2] : q.sizes[2];
  check(t, name, q, {q.sizes[0], q.sizes[1], own, q.sizes[3]});
  check_rows_contiguous(t, name);
  REQUIRE(t.type == q.type, name, " must be ", name_of(q.type), " as q is, not ", name_of(t.type));
  void* const data = const_cast<void*>(t.data);
  return {data, t.strides[0], t.strides[1], t.strides[2], data, t.strides[0], t.strides[1], t.strides[2],
          static_cast<int>(own)};
}

// Sources or destinations of q, k and v are one after another in `packed`, which has all their heads.
void pack(Rotary& a, const View& q, const View& k, const View& v, const View& packed, bool into_packed) {
  const Type type = float_type(q, "q");
  const int64_t head = q.sizes[3], seq = q.sizes[1];
  const View* const parts[] = {&q, &k, &v};
  const char* const names[] = {"q", "k", "v"};
  int64_t width = 0;
  for (int i = 0; i < 3; ++i) {
    a.views[i] = heads(*parts[i], names[i], q);
    width += a.views[i].heads * head;
  }
  const int64_t count = q.sizes[0] * seq * width;
  REQUIRE(packed.device == q.device && packed.type == type && packed.contiguous && packed.count == count,
          "packed must be contiguous, ", name_of(type), " and of ", count, " elements, not ", name_of(packed.type),
          " of ", packed.count);
  char* at = static_cast<char*>(const_cast<void*>(packed.data));
  for (HeadsView& view : a.views) {
    if (into_packed) {
      view.dst = at, view.dst_batch = seq * width, view.dst_seq = width, view.dst_head = head;
    } else {
      view.src = at, view.src_batch = seq * width, view.src_seq = width, view.src_head = head;
    }
    at += view.heads * head * (type == Type::bfloat16 ? 2 : 4);
  }
  a.count = 3;
}

}  // namespace

cudaError_t rotary_(cudaStream_t stream, Out q, Out k, View cos, View sin, bool conjugate) {
  Rotary a = arguments(q, cos, sin, conjugate);
  a.views[0] = heads(q, "q", q);
  a.views[1] = heads(k, "k", q);
  a.count = 2;
  return rotary(a, float_type(q, "q"), stream);
}

cudaError_t rotary_pack_into(cudaStream_t stream, View q, View k, View v, std::optional<View> cos,
                             std::optional<View> sin, bool conjugate, Out packed) {
  Rotary a = arguments(q, cos, sin, conjugate);
  pack(a, q, k, v, packed, true);
  return rotary(a, q.type, stream);
}

cudaError_t rotary_unpack_into(cudaStream_t stream, View packed, std::optional<View> cos, std::optional<View> sin,
                               bool conjugate, Out q, Out k, Out v) {
  Rotary a = arguments(q, cos, sin, conjugate);
  pack(a, q, k, v, packed, false);
  return rotary(a, q.type, stream);
}

}  // namespace mtlm
