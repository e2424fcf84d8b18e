// The matrix products of one decoding step, each fused with what comes before and after it. For every row n of a
// batch of 1 to 64:
//
//   qkv       y = W norm(x) + b;  q and k turned to the row's position;  k and v put into the cache there
//   residual  x += W a + b
//   gated     h = silu(Wg norm(x)) * (Wu norm(x))             gelu  h = gelu(W norm(x) + b), in its tanh form
//   logits    y = W norm(x), float32
//
// with norm(x) = x w / sqrt(mean(x^2) + eps). The factor of the row is applied behind the product, so the row is
// read once: its squares are summed while its elements, times w and rounded to bfloat16, go into the product.
//
// Every weight is read once, 2 bytes; that is the time: at batch 1 a layer of 768 x 2176 is 14.7 MB. One warp's
// product is mma.m16n8k16 with 16 rows of W as A and 8 rows of the batch as B, sums in float32. The order of the
// columns is ours to choose, if it is the same in both, so a lane holds 8 neighbours of a row of W, 16 bytes
// straight from memory, and the same 8 of the batch's row: no shared memory, no transposition. Batches of 1 and 8
// take the same time; larger ones take several tiles of 8, and twice the rows of W a block where that halves the
// reading of the batch's rows. Rows g and g + 8 of the tile are whatever two rows of W belong together: the halves
// of a rotated pair, or gate and up; their sums meet in one lane.
//
// A block is one tile of 16 rows (8 pairs), so that even 768 rows are spread over 48 multiprocessors. Its warps
// share out the columns, 32 at a time in turns, and add up their sums in a fixed order. Nothing of that depends on
// the batch, so neither does a row's result, to the bit. A library's product would leave norm, rotation, cache and
// activation to kernels of their own, and picks the order of its sums by the batch.
#include <cuda_bf16.h>

#include "decode.cuh"
#include "kernels.h"

namespace mtlm {
namespace {

constexpr int COLUMNS = 32;    // of a warp's turn: four lanes by 8
constexpr int MOST_TILES = 8;  // of 8 rows of the batch

template <DecodeInto INTO>
constexpr bool NORMED = INTO != DecodeInto::residual;

__host__ __device__ __forceinline__ int tiles_of(const DecodeProjection& a) { return (a.rows + 15) / 16; }

// The first row of a tile's first or second eight.
template <DecodeInto INTO>
__device__ __forceinline__ int row_of(const DecodeProjection& a, int tile, bool second) {
  if constexpr (INTO == DecodeInto::qkv) {
    const int half = a.head_size / 2, per_head = half / 8;
    return tile / per_head * a.head_size + tile % per_head * 8 + (second ? half : 0);
  } else if constexpr (INTO == DecodeInto::gated) {
    return tile * 8 + (second ? a.rows / 2 : 0);
  } else {
    return tile * 16 + (second ? 8 : 0);
  }
}

__device__ __forceinline__ void multiply(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3,
                                         unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned times(unsigned x, unsigned y) {
  const __nv_bfloat162 product =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&x), *reinterpret_cast<const __nv_bfloat162*>(&y));
  return *reinterpret_cast<const unsigned*>(&product);
}

// What a pair of rows of W needs beside its sums, for row n of the batch. Read ahead of them.
struct Beside {
  float bias[2] = {0.f, 0.f};
  float cos = 1.f, sin = 0.f;
  float x[2] = {0.f, 0.f};  // the residual stream so far
  int64_t position = 0;
};

template <DecodeInto INTO>
__device__ __forceinline__ Beside read_beside(const DecodeProjection& a, int tile, int pair, int n) {
  Beside beside;
  const int rows[2] = {row_of<INTO>(a, tile, false) + pair, row_of<INTO>(a, tile, true) + pair};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows[i] >= a.rows) continue;
    if (a.bias != nullptr) beside.bias[i] = to_float(static_cast<const bf16*>(a.bias)[rows[i]]);
    if constexpr (INTO == DecodeInto::residual) {
      beside.x[i] = read_fresh_element(static_cast<const bf16*>(a.out) + static_cast<int64_t>(n) * a.rows + rows[i]);
    }
  }
  if constexpr (INTO == DecodeInto::qkv) {
    beside.position = read_fresh(a.position + n);
    if (a.cos != nullptr && rows[0] < a.rows / 3 * 2) {  // of q and k
      const int64_t angle = beside.position * (a.head_size / 2) + rows[0] % a.head_size;
      beside.cos = a.cos[angle];
      beside.sin = a.sin[angle];
    }
  }
  return beside;
}

// What is done with the two sums.
template <DecodeInto INTO>
__device__ __forceinline__ void finish(const DecodeProjection& a, int tile, int pair, int n, float first, float second,
                                       const Beside& beside) {
  const int rows[2] = {row_of<INTO>(a, tile, false) + pair, row_of<INTO>(a, tile, true) + pair};
  first += beside.bias[0];
  second += beside.bias[1];
  if constexpr (INTO == DecodeInto::qkv) {
    const int d = a.rows / 3, part = rows[0] / d, at = rows[0] - part * d;
    if (part < 2 && a.cos != nullptr) {  // of the rounded values, as a model that stores them has it
      const float x = rounded<bf16>(first), y = rounded<bf16>(second);
      first = x * beside.cos - y * beside.sin;
      second = y * beside.cos + x * beside.sin;
    }
    bf16* out = part == 0 ? static_cast<bf16*>(a.out) + static_cast<int64_t>(n) * d
                          : static_cast<bf16*>(part == 1 ? a.k_cache : a.v_cache) + n * a.cache_batch +
                                beside.position * a.cache_position;
    out[at] = from_float<bf16>(first);
    out[at + a.head_size / 2] = from_float<bf16>(second);
  } else if constexpr (INTO == DecodeInto::gated) {
    const int64_t at = static_cast<int64_t>(n) * (a.rows / 2) + rows[0];
    static_cast<bf16*>(a.out)[at] = from_float<bf16>(first / (1.f + __expf(-first)) * second);
  } else {
    const float sums[2] = {first, second};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows[i] >= a.rows) continue;
      const int64_t at = static_cast<int64_t>(n) * a.rows + rows[i];
      if constexpr (INTO == DecodeInto::logits) {
        static_cast<float*>(a.out)[at] = sums[i];
      } else if constexpr (INTO == DecodeInto::residual) {
        static_cast<bf16*>(a.out)[at] = from_float<bf16>(beside.x[i] + sums[i]);
      } else {
        const float x = sums[i], inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        static_cast<bf16*>(a.out)[at] = from_float<bf16>(0.5f * x * (1.f + tanhf(inner)));
      }
    }
  }
}

// SLICES warps share out the columns; GROUPS of them the block's part of the batch, TILES of 8 rows each. A block has
// WIDE tiles of W; blocks of the same tiles and other parts of the batch are neighbours, so W comes from memory once.
// AHEAD turns of a warp are in flight at once, those of W from before the wait on if no other warp needs them too.
// The largest block must fit twice on a multiprocessor: gate and up of 2176 rows are 136 of them.
template <DecodeInto INTO, int SLICES, int GROUPS, int TILES, int WIDE, int AHEAD>
__global__ __launch_bounds__(32 * SLICES * GROUPS, WIDE * GROUPS == 4 ? 2 : 1) void project(
    const __grid_constant__ DecodeProjection a) {
  constexpr int PART = 8 * TILES * GROUPS;  // of the batch
  constexpr int ROW = PART + 4;             // floats from row to row of the sums, over all banks
  __shared__ float sums[SLICES][WIDE][16][ROW];
  __shared__ float squares[SLICES][PART];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32 % SLICES, group = threadIdx.x / 32 / SLICES;
  const int g = lane / 4, t = lane % 4;
  const int parts = (a.batch + PART - 1) / PART;
  const int begin = blockIdx.x % parts * PART, here = min(PART, a.batch - begin);  // of the batch
  const int first_tile = blockIdx.x / parts * WIDE, tiles = tiles_of(a);
  const int turns = ((a.columns + COLUMNS - 1) / COLUMNS + SLICES - 1) / SLICES;
  // Attention behind it reads the cache before its wait: what is there was written by earlier steps.
  if constexpr (INTO != DecodeInto::qkv) launch_next();

  const bf16* rows[WIDE][2];  // null: no such row
#pragma unroll
  for (int w = 0; w < WIDE; ++w) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile = first_tile + w, row = row_of<INTO>(a, tile, i == 1) + g;
      const bool there = tile < tiles && row < a.rows;
      rows[w][i] = there ? static_cast<const bf16*>(a.weight) + static_cast<int64_t>(row) * a.columns : nullptr;
    }
  }
  const auto column_of = [&](int turn) { return (turn * SLICES + slice) * COLUMNS + t * 8; };
  constexpr uint4 ZERO = {0, 0, 0, 0};
  uint4 weights[AHEAD][WIDE][2], scales[AHEAD];
  const auto read = [](const bf16* p) { return GROUPS == 1 ? read_fresh(p) : read_weights(p); };
  const auto fetch = [&](int turn, uint4 (&of_rows)[WIDE][2], uint4& scale) {
    const int column = column_of(turn);
    const bool inside = column < a.columns;
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        of_rows[w][i] = inside && rows[w][i] != nullptr ? read(rows[w][i] + column) : ZERO;
      }
    }
    if constexpr (NORMED<INTO>) scale = inside ? read(static_cast<const bf16*>(a.norm) + column) : ZERO;
  };
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) fetch(i, weights[i], scales[i]);
  const int items = WIDE * here * 8;  // pairs of sums; the first of a thread begins here
  const auto pair_of = [](int item) { return item % 8; };
  const auto row_in_part = [&](int item) { return item / 8 % here; };
  const auto tile_of = [&](int item) { return first_tile + item / 8 / here; };
  const auto beside_of = [&](int item) {
    return item < items && tile_of(item) < tiles
               ? read_beside<INTO>(a, tile_of(item), pair_of(item), begin + row_in_part(item))
               : Beside();
  };
  constexpr bool EARLY = TILES == 1;  // with more, registers are short
  Beside beside;
  if constexpr (EARLY && INTO == DecodeInto::qkv) beside = beside_of(threadIdx.x);
  wait_for_previous();
  if constexpr (INTO == DecodeInto::qkv) launch_next();
  if constexpr (EARLY && INTO != DecodeInto::qkv) beside = beside_of(threadIdx.x);

  float sum[WIDE][TILES][4] = {};
  float square[TILES] = {};
  for (int turn = 0; turn < turns; turn += AHEAD) {
    uint4 x[AHEAD][TILES];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      const int column = column_of(turn + i);
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const int n = (group * TILES + tile) * 8 + g;
        const bool there = n < here && column < a.columns;
        const int64_t at = static_cast<int64_t>(begin + n) * a.columns + column;
        x[i][tile] = there ? read_fresh(static_cast<const bf16*>(a.in) + at) : ZERO;
      }
    }
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        uint4 b = x[i][tile];
        if constexpr (NORMED<INTO>) {
          float values[8];
          as_floats(b, values);
#pragma unroll
          for (int j = 0; j < 8; ++j) square[tile] = fmaf(values[j], values[j], square[tile]);
          b = {times(b.x, scales[i].x), times(b.y, scales[i].y), times(b.z, scales[i].z), times(b.w, scales[i].w)};
        }
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
          const uint4 &p = weights[i][w][0], &q = weights[i][w][1];
          multiply(sum[w][tile], p.x, q.x, p.y, q.y, b.x, b.y);
          multiply(sum[w][tile], p.z, q.z, p.w, q.w, b.z, b.w);
        }
      }
      if (turn + AHEAD < turns) fetch(turn + AHEAD + i, weights[i], scales[i]);
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int n = (group * TILES + tile) * 8;
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
      const float(&s)[4] = sum[w][tile];
      *reinterpret_cast<float2*>(&sums[slice][w][g][n + 2 * t]) = {s[0], s[1]};
      *reinterpret_cast<float2*>(&sums[slice][w][g + 8][n + 2 * t]) = {s[2], s[3]};
    }
    if constexpr (NORMED<INTO>) {
      const float all = sum_over_lanes<4>(square[tile]);
      if (t == 0) squares[slice][n + g] = all;
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < items && tile_of(item) < tiles; item += 32 * SLICES * GROUPS) {
    const int pair = pair_of(item), n = row_in_part(item), w = tile_of(item) - first_tile;
    float first = 0.f, second = 0.f, all = 0.f;
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
      first += sums[s][w][pair][n];
      second += sums[s][w][pair + 8][n];
      if constexpr (NORMED<INTO>) all += squares[s][n];
    }
    if constexpr (NORMED<INTO>) {
      const float factor = rsqrtf(all / static_cast<float>(a.columns) + a.eps);
      first *= factor;
      second *= factor;
    }
    if (!EARLY || item != threadIdx.x) beside = beside_of(item);
    finish<INTO>(a, tile_of(item), pair, begin + n, first, second, beside);
  }
}

template <DecodeInto INTO, int SLICES, int GROUPS, int TILES, int WIDE, int AHEAD>
cudaError_t launch(const DecodeProjection& a, cudaStream_t stream) {
  constexpr int PART = 8 * TILES * GROUPS;
  const int blocks = (tiles_of(a) + WIDE - 1) / WIDE * ((a.batch + PART - 1) / PART);
  return launch_chained(project<INTO, SLICES, GROUPS, TILES, WIDE, AHEAD>, a, blocks, 32 * SLICES * GROUPS, 1, stream);
}

// SLICES follows from the columns alone, so that sums are added up in one order whatever the batch. With one tile of
// the batch AHEAD covers a whole row (768 columns; behind an MLP 2176) from before the wait on; with more tiles
// registers are short. More than 32 rows are two parts, of blocks of their own where one for both would leave
// multiprocessors idle, as 48 or 72 do.
template <DecodeInto INTO>
cudaError_t by_size(const DecodeProjection& a, cudaStream_t stream) {
  constexpr int WIDE = INTO == DecodeInto::residual ? 1 : 2;  // 48 tiles, 24 of them would leave the GPU empty
  constexpr int AHEAD = INTO == DecodeInto::residual ? 3 : 2;
  const int tiles = (a.batch + 7) / 8;
  const bool whole = tiles > 4 && tiles_of(a) / WIDE >= multiprocessors();
  if (a.columns <= 1024) {
    if (tiles == 1) return launch<INTO, 4, 1, 1, 1, 6>(a, stream);
    if (tiles == 2) return launch<INTO, 4, 1, 2, 1, 3>(a, stream);
    if (whole) return launch<INTO, 4, 2, 4, WIDE, 2>(a, stream);
    return launch<INTO, 4, 1, 4, WIDE, AHEAD>(a, stream);
  }
  if (tiles == 1) return launch<INTO, 8, 1, 1, 1, NORMED<INTO> ? 4 : 9>(a, stream);
  if (tiles == 2) return launch<INTO, 8, 1, 2, 1, 3>(a, stream);
  if (whole) return launch<INTO, 8, 2, 4, 1, 2>(a, stream);
  return launch<INTO, 8, 1, 4, 1, AHEAD>(a, stream);
}

}  // namespace

cudaError_t decode_project(const DecodeProjection& a, DecodeInto into, cudaStream_t stream) {
  if (a.batch > 8 * MOST_TILES) return cudaErrorInvalidValue;
  switch (into) {
    case DecodeInto::qkv: return by_size<DecodeInto::qkv>(a, stream);
    case DecodeInto::residual: return by_size<DecodeInto::residual>(a, stream);
    case DecodeInto::gated: return by_size<DecodeInto::gated>(a, stream);
    case DecodeInto::gelu: return by_size<DecodeInto::gelu>(a, stream);
    default: return by_size<DecodeInto::logits>(a, stream);
  }
}

}  // namespace mtlm
