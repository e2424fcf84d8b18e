// The product of queries, keys and values with their bias, and the rotation of queries and keys (rotary.cu) in its
// epilogue. Hopper only.
//
//   y = x weight^T + bias        a' = a cos - b sin        b' = b cos + a sin        of elements i and i + K/2 of a head
//
// On its own the rotation reads and writes q and k once more and, where q, k and v must lie apart, v as well. Here it
// reads the angles alone, which stay in the L2 cache. A tile's 128 columns are two heads of 64 elements or one of 128,
// and a lane that has the sum of column c has that of c + K/2, too: nothing is exchanged. Sums, bias and rotation are
// float32, rounded once.
//
// q, k and v are matrices of their own or parts of a packed one. Each begins at a multiple of 64 columns of the product,
// so that half a tile belongs to one of them. Without angles nothing is rotated: they are only told apart.
#include "angles.cuh"
#include "epilogue.cuh"

namespace mtlm {
namespace qkv {  // not unnamed: for other architectures kernels are empty, and nothing here is used

using namespace hopper;

constexpr int PARTS = 3;

// K: elements of a head.
template <int K>
struct Rotated {
  struct Results {
    CUtensorMap parts[PARTS];  // q, k and v
    int ends[PARTS];           // the product's column behind each
    int rotated;               // how many columns are: all of q and k, or none
    int angle_rows;            // of cos and sin: positions, of one sequence for all or of each
    const float *cos, *sin;    // [angle_rows, K / 2]
    const float* bias;         // of all columns; null: none
  };
  static constexpr int STAGES = 6, PIECES = 2, BARRIERS = 0, N = TILE, HALVES = 1;
  static constexpr int HALF = N / 2;       // of a tile, which one of the parts has
  static constexpr int ROWS = 2;           // of a lane in a block of 64
  static constexpr int APART = K / 16;     // from a pair of columns to the one that it rotates with
  static constexpr int AT_ONCE = 256 / K;  // pairs of columns whose angles are loaded at once: more would be spilled
  uint32_t pieces, barriers;
  int lane, written = 0;
  float2 bias[N / 8];  // of columns 8 j + 2 (lane % 4) and the next, whose sums this lane has

  __device__ __forceinline__ void begin(const Results& results, int tile, int) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const int column = tile * N + 8 * j + lane % 4 * 2;
      const bool there = results.bias != nullptr && column < results.ends[PARTS - 1];
      bias[j] = there ? __ldg(reinterpret_cast<const float2*>(results.bias + column)) : float2{};
    }
  }

  __device__ __forceinline__ void finish(const Results& results, int tile, int row, const float (&sums)[M_BLOCKS][64]) {
#pragma unroll
    for (int m = 0; m < M_BLOCKS; ++m) {
      uint32_t packed[N / 8][ROWS];
      const auto value = [&](int j, int i) -> float2 {
        const float* sum = sums[m] + 4 * j + 2 * i;
        return {sum[0] + bias[j].x, sum[1] + bias[j].y};
      };
#pragma unroll
      for (int from = 0; from < APART; from += AT_ONCE) {
        float2 cos[AT_ONCE][ROWS], sin[AT_ONCE][ROWS];
        if (tile * N < results.rotated) load_angles(results, row + m * 64, from, cos, sin);
#pragma unroll
        for (int head = 0; head < N / 8; head += 2 * APART) {
          const int first = head + from, second = first + APART;
          if (tile * N + 8 * head < results.rotated) {
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
#pragma unroll
              for (int i = 0; i < ROWS; ++i) {
                const float2 a = value(first + n, i), b = value(second + n, i), c = cos[n][i], s = sin[n][i];
                const float2 x = turned(a.x, b.x, c.x, s.x), y = turned(a.y, b.y, c.y, s.y);
                packed[first + n][i] = pack_bf16(x.x, y.x), packed[second + n][i] = pack_bf16(x.y, y.y);
              }
            }
          } else {
#pragma unroll
            for (int n = 0; n < AT_ONCE; ++n) {
#pragma unroll
              for (int i = 0; i < ROWS; ++i) {
                const float2 a = value(first + n, i), b = value(second + n, i);
                packed[first + n][i] = pack_bf16(a.x, a.y), packed[second + n][i] = pack_bf16(b.x, b.y);
              }
            }
          }
        }
      }
#pragma unroll
      for (int half = 0; half < N / HALF; ++half) {
        const int x = tile * N + half * HALF;
        if (x >= results.ends[PARTS - 1]) continue;  // beyond the last head
        const int part = (x >= results.ends[0]) + (x >= results.ends[1]);
        const int begin = part == 0 ? 0 : results.ends[part - 1];
        store(*this, &results.parts[part], x - begin, row + m * 64,
              [&](int i) { return packed[half * HALF / 8 + i / ROWS][i % ROWS]; });
      }
    }
  }

  // Those of AT_ONCE of the columns in this lane's rows of a block. Rows beyond the matrix get some, too.
  __device__ __forceinline__ void load_angles(const Results& results, int row, int from, float2 (&cos)[AT_ONCE][ROWS],
                                              float2 (&sin)[AT_ONCE][ROWS]) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int own = (row + 8 * i + lane / 4) % results.angle_rows;
      const int64_t at = static_cast<int64_t>(own) * (K / 2) + 8 * from + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < AT_ONCE; ++n) {
        cos[n][i] = __ldg(reinterpret_cast<const float2*>(results.cos + at + 8 * n));
        sin[n][i] = __ldg(reinterpret_cast<const float2*>(results.sin + at + 8 * n));
      }
    }
  }
};

// A part's tokens are rows of a matrix, `stride` elements apart.
inline CUtensorMap describe_part(const View& t, const char* name, const View& q, const View& x) {
  const int64_t seq = q.sizes[1], heads = t.sizes[2], size = q.sizes[3];
  check(t, name, x, {q.sizes[0], seq, heads, size});
  REQUIRE(t.type == Type::bfloat16, name, " must be bfloat16, not ", name_of(t.type));
  const int64_t stride = t.strides[1];
  REQUIRE(t.strides[0] == seq * stride && t.strides[2] == size && t.strides[3] == 1, name,
          " must have its heads side by side and its tokens equally far apart");
  REQUIRE(stride % 8 == 0 && aligned(t.data, 16), "tokens of ", name, " must begin at multiples of 16 bytes");
  return describe_matrix(t.data, q.sizes[0] * seq, heads * size, stride, PIECE_ROWS);
}

}  // namespace qkv

using namespace qkv;

// x [N, D], weight [(H + 2 G) K, D] (inputs_first: [D, (H + 2 G) K]), bias [(H + 2 G) K] in float32, or none; cos and
// sin [1 or B, S, K / 2] in float32, or none -> q [B, S, H, K], k and v [B, S, G, K], of N = B S tokens
cudaError_t qkv_product_into(cudaStream_t stream, View x, View weight, std::optional<View> bias,
                             std::optional<View> cos, std::optional<View> sin, bool inputs_first, Out q, Out k, Out v) {
  check_matrix(x, "x");
  REQUIRE(q.dims == 4 && k.dims == 4 && v.dims == 4, "q, k and v must be [batch, seq, heads, head size], not ",
          shape(q), ", ", shape(k), " and ", shape(v));
  const int64_t rows = q.sizes[0] * q.sizes[1], size = q.sizes[3], inner = x.sizes[1];
  const int64_t width = (q.sizes[2] + k.sizes[2] + v.sizes[2]) * size;
  check_widths(inner, width);
  check_operand(x, "x", x, {rows, inner});
  check_matrix_of(weight, "weight", x, width, inner, inputs_first);
  if (bias) {
    check(*bias, "bias", x, {width}, Type::float32);
    REQUIRE(aligned(bias->data, 8), "bias must begin at a multiple of 8 bytes");
  }
  const Angles angles = checked_angles(cos, sin, q);
  REQUIRE(aligned(angles.cos, 8) && aligned(angles.sin, 8), "cos and sin must begin at multiples of 8 bytes");
  cudaError_t error = cudaSuccess;
  const bool known = dispatch<64, 128>(static_cast<int>(size), [&](auto head) {
    using Epilogue = Rotated<head.value>;
    const int64_t of_q = q.sizes[2] * size, of_q_and_k = of_q + k.sizes[2] * size;
    if (rows == 0) return;
    Maps<Epilogue> maps{};
    maps.a = describe_matrix(x.data, rows, inner, inner, TILE);
    maps.weights[0] = describe_weights(weight, width, inner, inputs_first);
    maps.results = {{describe_part(q, "q", q, x), describe_part(k, "k", q, x), describe_part(v, "v", q, x)},
                    {static_cast<int>(of_q), static_cast<int>(of_q_and_k), static_cast<int>(width)},
                    angles.cos == nullptr ? 0 : static_cast<int>(of_q_and_k),
                    static_cast<int>(angles.batch * q.sizes[1]),
                    angles.cos,
                    angles.sin,
                    bias ? bias->as<float>() : nullptr};
    error = launch(stream, maps, inputs_first, rows, width, inner);
  });
  REQUIRE(known, "heads must have 64 or 128 elements, not ", size);
  return error;
}

}  // namespace mtlm
