// The matrix products of one decoding step, each fused with what comes before and after it. For every row n of a
// batch of 1 to 64:
//
//   qkv       y = W norm(x) + b;  q and k turned to the row's position;  k and v put into the cache there
//   residual  x += W a + b
//   gated     h = silu(Wg norm(x) + bg) * (Wu norm(x) + bu)   gelu  h = gelu(W norm(x) + b), in its tanh form
//   logits    y = W norm(x), float32
//
// with norm(x) = x w / sqrt(mean(x^2) + eps). The factor of the row is applied behind the product, so the row is
// read once: its squares are summed while its elements, times w and rounded to bfloat16, go into the product.
//
// Every weight is read once, 2 bytes; that is the time: at batch 1 a layer of 768 x 2176 is 14.7 MB. One warp's
// product is mma.m16n8k16 with 16 rows of W as A and 8 rows of the batch as B, sums in float32. The order of the
// columns is ours to choose, if it is the same in both, so a lane holds 8 neighbours of a row of W, 16 bytes as they
// lie in memory, and the same 8 of the batch's row: no transposition. Batches of 1 and 8 take the same time. Rows g
// and g + 8 of the tile are whatever two rows of W belong together: the halves of a rotated pair, or gate and up;
// their sums meet in one lane.
//
// A block is one tile of 16 rows (8 pairs), so that even 768 rows are spread over 48 multiprocessors, or a few tiles
// by a part of the batch. Its warps share out the columns, 32 at a time in turns, and add up their sums in a fixed
// order. Nothing of that depends on the batch, so neither does a row's result, to the bit. A library's product would
// leave norm, rotation, cache and activation to kernels of their own, and picks the order of its sums by the batch.
#include "angles.cuh"
#include "decode.cuh"

namespace mtlm {
namespace {

constexpr int COLUMNS = 32;    // of a warp's turn: four lanes by 8
constexpr int64_t MOST_ELEMENTS = 1 << 28;  // rows or columns of a matrix

enum class Into { qkv, residual, gated, gelu, logits };

// Everything bfloat16 and contiguous but for what says otherwise; columns a multiple of 8.
struct Projection {
  const void* in;      // [batch, columns]
  const void* norm;    // [columns]; unused for `residual`
  float eps;
  const void* weight;  // [rows, columns]: q, k, v; or gate, up for `gated`
  const void* bias;    // [rows] or null; null for `logits`
  void* out;           // q [batch, q_rows]; x; hidden [batch, rows, or half of it]; float32 logits
  int batch, rows, columns;
  // Of `qkv` alone; the head size a multiple of 16. The rows: q_rows of q, kv_rows of k, as many of v; whole heads.
  int head_size, q_rows, kv_rows;
  const int64_t* position;  // [batch]
  const float* cos;         // [positions, head size / 2] or null
  const float* sin;
  void* k_cache;            // [batch, positions, kv heads, head size], heads and their elements contiguous
  void* v_cache;
  int64_t cache_batch, cache_position;  // elements from row to row, from position to position
};

template <Into INTO>
constexpr bool NORMED = INTO != Into::residual;

__host__ __device__ __forceinline__ int tiles_of(const Projection& a) { return (a.rows + 15) / 16; }

// The first row of a tile's first or second eight.
template <Into INTO>
__device__ __forceinline__ int row_of(const Projection& a, int tile, bool second) {
  if constexpr (INTO == Into::qkv) {
    const int half = a.head_size / 2, per_head = half / 8;
    return tile / per_head * a.head_size + tile % per_head * 8 + (second ? half : 0);
  } else if constexpr (INTO == Into::gated) {
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

// What is done with the sums of a pair of rows of W, for row n of the batch, needs these. Read ahead of the sums.
struct Epilogue {
  float bias[2] = {0.f, 0.f};
  float cos = 1.f, sin = 0.f;
  float x[2] = {0.f, 0.f};  // the residual stream so far
  int64_t position = 0;
};

template <Into INTO>
__device__ __forceinline__ Epilogue read_epilogue(const Projection& a, int tile, int pair, int n) {
  Epilogue epilogue;
  const int rows[2] = {row_of<INTO>(a, tile, false) + pair, row_of<INTO>(a, tile, true) + pair};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (rows[i] >= a.rows) continue;
    if constexpr (INTO != Into::logits) {
      if (a.bias != nullptr) epilogue.bias[i] = to_float(static_cast<const bf16*>(a.bias)[rows[i]]);
    }
    if constexpr (INTO == Into::residual) {
      epilogue.x[i] = read_fresh_element(static_cast<const bf16*>(a.out) + static_cast<int64_t>(n) * a.rows + rows[i]);
    }
  }
  if constexpr (INTO == Into::qkv) {
    epilogue.position = read_fresh(a.position + n);
    if (a.cos != nullptr && rows[0] < a.q_rows + a.kv_rows) {  // of q and k
      const int64_t angle = epilogue.position * (a.head_size / 2) + rows[0] % a.head_size;
      epilogue.cos = a.cos[angle];
      epilogue.sin = a.sin[angle];
    }
  }
  return epilogue;
}

// Writes what the two sums become.
template <Into INTO>
__device__ __forceinline__ void finish(const Projection& a, int tile, int pair, int n, float first, float second,
                                       const Epilogue& epilogue) {
  const int rows[2] = {row_of<INTO>(a, tile, false) + pair, row_of<INTO>(a, tile, true) + pair};
  first += epilogue.bias[0];
  second += epilogue.bias[1];
  if constexpr (INTO == Into::qkv) {
    const bool of_q = rows[0] < a.q_rows, of_v = rows[0] >= a.q_rows + a.kv_rows;
    if (!of_v && a.cos != nullptr) {  // of the rounded values, as a model that stores them has it
      const float2 both = turned(rounded<bf16>(first), rounded<bf16>(second), epilogue.cos, epilogue.sin);
      first = both.x, second = both.y;
    }
    bf16* out;
    int at = rows[0];
    if (of_q) {
      out = static_cast<bf16*>(a.out) + static_cast<int64_t>(n) * a.q_rows;
    } else {
      out = static_cast<bf16*>(of_v ? a.v_cache : a.k_cache) + n * a.cache_batch + epilogue.position * a.cache_position;
      at -= of_v ? a.q_rows + a.kv_rows : a.q_rows;
    }
    out[at] = from_float<bf16>(first);
    out[at + a.head_size / 2] = from_float<bf16>(second);
  } else if constexpr (INTO == Into::gated) {
    const int64_t at = static_cast<int64_t>(n) * (a.rows / 2) + rows[0];
    static_cast<bf16*>(a.out)[at] = from_float<bf16>(first / (1.f + __expf(-first)) * second);
  } else {
    const float sums[2] = {first, second};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (rows[i] >= a.rows) continue;
      const int64_t at = static_cast<int64_t>(n) * a.rows + rows[i];
      if constexpr (INTO == Into::logits) {
        static_cast<float*>(a.out)[at] = sums[i];
      } else if constexpr (INTO == Into::residual) {
        static_cast<bf16*>(a.out)[at] = from_float<bf16>(epilogue.x[i] + sums[i]);
      } else {
        const float x = sums[i], inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        static_cast<bf16*>(a.out)[at] = from_float<bf16>(0.5f * x * (1.f + tanhf(inner)));
      }
    }
  }
}

// SLICES warps share out the columns; each has the whole block's WIDE tiles of W and TILES of 8 rows of the batch.
// Blocks of the same tiles of W and other parts of the batch are neighbours, so W comes from memory once.
//
// What a lane multiplies it has copied itself, 16 bytes at a time, into shared memory: registers would not hold what
// must be in flight. STAGES turns are: those of W from before the wait on, those of the batch right behind it. AT_ONCE
// of them are waited for together.
template <Into INTO, int SLICES, int TILES, int WIDE, int STAGES, int AT_ONCE>
struct Shape {
  static constexpr int THREADS = 32 * SLICES, PART = 8 * TILES;  // of the batch
  static constexpr int CHUNKS = 32 * (2 * WIDE + TILES) + (NORMED<INTO> ? 4 : 0);  // of 16 bytes, of a warp's turn
  static constexpr int ROW = PART + 4;  // floats from row to row of the sums, over all banks
  static constexpr int SUMS = WIDE * 16 * ROW;
  static constexpr int ITEMS = (WIDE * PART * 8 + THREADS - 1) / THREADS;  // pairs of sums that a thread ends
  static constexpr int BYTES = 16 * SLICES * STAGES * CHUNKS;
  static_assert(STAGES % AT_ONCE == 0 && 4 * SLICES * (SUMS + PART) <= BYTES);
};

template <Into INTO, int SLICES, int TILES, int WIDE, int STAGES, int AT_ONCE>
__global__ __launch_bounds__(32 * SLICES) void project(const __grid_constant__ Projection a) {
  using S = Shape<INTO, SLICES, TILES, WIDE, STAGES, AT_ONCE>;
  extern __shared__ uint4 shared[];
  const int lane = threadIdx.x % 32, slice = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int parts = (a.batch + S::PART - 1) / S::PART;
  const int begin = blockIdx.x % parts * S::PART, here = min(S::PART, a.batch - begin);  // of the batch
  const int first_tile = blockIdx.x / parts * WIDE, tiles = tiles_of(a);
  constexpr int TOGETHER = COLUMNS * SLICES * AT_ONCE;
  const int turns = (a.columns + TOGETHER - 1) / TOGETHER * AT_ONCE;  // behind the columns are zeros
  // Attention behind it reads the cache before its wait: what is there was written by earlier steps.
  if constexpr (INTO != Into::qkv) launch_next();

  const bf16* weights[WIDE][2];  // null: no such row
#pragma unroll
  for (int w = 0; w < WIDE; ++w) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = row_of<INTO>(a, first_tile + w, i == 1) + g;
      const bool there = first_tile + w < tiles && row < a.rows;
      weights[w][i] = there ? static_cast<const bf16*>(a.weight) + static_cast<int64_t>(row) * a.columns : nullptr;
    }
  }
  const auto column_of = [&](int turn) { return (turn * SLICES + slice) * COLUMNS + t * 8; };
  const auto stage_of = [&](int turn) { return shared + (slice * STAGES + turn % STAGES) * S::CHUNKS; };
  const auto copy_weights = [&](int turn) {
    const int column = column_of(turn);
    uint4* to = stage_of(turn) + lane;
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const bool there = column < a.columns && weights[w][i] != nullptr;
        copy_or_zero(to + 32 * (2 * w + i), there ? weights[w][i] + column : a.weight, there);
      }
    }
    if (NORMED<INTO> && g == 0) {
      const bool there = column < a.columns;
      const bf16* from = static_cast<const bf16*>(a.norm) + (there ? column : 0);
      copy_or_zero(to + 32 * (2 * WIDE + TILES), from, there);
    }
  };
  const auto copy_in = [&](int turn) {
    const int column = column_of(turn);
    uint4* to = stage_of(turn) + 32 * 2 * WIDE + lane;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
      const int n = tile * 8 + g;
      const bool there = n < here && column < a.columns;
      const int64_t at = static_cast<int64_t>(begin + n) * a.columns + column;
      copy_or_zero(to + 32 * tile, static_cast<const bf16*>(a.in) + (there ? at : 0), there);
    }
  };
#pragma unroll
  for (int i = 0; i < STAGES; ++i) copy_weights(i);
  Epilogue epilogue[S::ITEMS];
  const auto pair_of = [](int item) { return item % 8; };
  const auto row_in_part = [](int item) { return item / 8 % S::PART; };
  const auto tile_of = [&](int item) { return first_tile + item / 8 / S::PART; };
  const auto is_there = [&](int item) {
    return item < WIDE * S::PART * 8 && row_in_part(item) < here && tile_of(item) < tiles;
  };
  const auto read_epilogues = [&] {
#pragma unroll
    for (int i = 0; i < S::ITEMS; ++i) {
      const int item = i * S::THREADS + threadIdx.x;
      if (is_there(item)) epilogue[i] = read_epilogue<INTO>(a, tile_of(item), pair_of(item), begin + row_in_part(item));
    }
  };
  if constexpr (INTO == Into::qkv) read_epilogues();
  wait_for_previous();
  if constexpr (INTO == Into::qkv) launch_next();
#pragma unroll
  for (int i = 0; i < STAGES; ++i) {
    copy_in(i);
    end_of_copies();
  }
  if constexpr (INTO != Into::qkv) read_epilogues();

  float sum[WIDE][TILES][4] = {};
  float square[TILES] = {};
  for (int turn = 0; turn < turns; turn += AT_ONCE) {
    wait_for_copies<STAGES - AT_ONCE>();
    __syncwarp();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const uint4* from = stage_of(turn + i) + lane;
      uint4 p[WIDE], q[WIDE], scale;
#pragma unroll
      for (int w = 0; w < WIDE; ++w) p[w] = from[32 * 2 * w], q[w] = from[32 * (2 * w + 1)];
      if constexpr (NORMED<INTO>) scale = stage_of(turn + i)[32 * (2 * WIDE + TILES) + t];
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        uint4 b = from[32 * (2 * WIDE + tile)];
        if constexpr (NORMED<INTO>) {
          float values[8];
          as_floats(b, values);
#pragma unroll
          for (int j = 0; j < 8; ++j) square[tile] = fmaf(values[j], values[j], square[tile]);
          b = {times(b.x, scale.x), times(b.y, scale.y), times(b.z, scale.z), times(b.w, scale.w)};
        }
#pragma unroll
        for (int w = 0; w < WIDE; ++w) {
          multiply(sum[w][tile], p[w].x, q[w].x, p[w].y, q[w].y, b.x, b.y);
          multiply(sum[w][tile], p[w].z, q[w].z, p[w].w, q[w].w, b.z, b.w);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      if (turn + STAGES + i < turns) {
        copy_weights(turn + STAGES + i);
        copy_in(turn + STAGES + i);
      }
      end_of_copies();
    }
  }
  wait_for_copies<0>();
  __syncthreads();  // the sums lie where the copies were
  float* sums = reinterpret_cast<float*>(shared);
  float* squares = sums + SLICES * S::SUMS;
  const auto place = [&](int s, int w, int row, int n) { return s * S::SUMS + (w * 16 + row) * S::ROW + n; };
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    const int n = tile * 8;
#pragma unroll
    for (int w = 0; w < WIDE; ++w) {
      const float(&s)[4] = sum[w][tile];
      *reinterpret_cast<float2*>(&sums[place(slice, w, g, n + 2 * t)]) = {s[0], s[1]};
      *reinterpret_cast<float2*>(&sums[place(slice, w, g + 8, n + 2 * t)]) = {s[2], s[3]};
    }
    if constexpr (NORMED<INTO>) {
      const float all = sum_over_lanes<4>(square[tile]);
      if (t == 0) squares[slice * S::PART + n + g] = all;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < S::ITEMS; ++i) {
    const int item = i * S::THREADS + threadIdx.x;
    if (!is_there(item)) continue;
    const int pair = pair_of(item), n = row_in_part(item), w = tile_of(item) - first_tile;
    float first = 0.f, second = 0.f, all = 0.f;
#pragma unroll
    for (int s = 0; s < SLICES; ++s) {
      first += sums[place(s, w, pair, n)];
      second += sums[place(s, w, pair + 8, n)];
      if constexpr (NORMED<INTO>) all += squares[s * S::PART + n];
    }
    if constexpr (NORMED<INTO>) {
      const float factor = rsqrtf(all / static_cast<float>(a.columns) + a.eps);
      first *= factor;
      second *= factor;
    }
    finish<INTO>(a, tile_of(item), pair, begin + n, first, second, epilogue[i]);
  }
}

template <Into INTO, int SLICES, int TILES, int WIDE, int STAGES, int AT_ONCE>
cudaError_t launch(const Projection& a, cudaStream_t stream) {
  using S = Shape<INTO, SLICES, TILES, WIDE, STAGES, AT_ONCE>;
  const int blocks = (tiles_of(a) + WIDE - 1) / WIDE * ((a.batch + S::PART - 1) / S::PART);
  const auto kernel = project<INTO, SLICES, TILES, WIDE, STAGES, AT_ONCE>;
  return launch_chained(kernel, a, blocks, S::THREADS, 1, stream, S::BYTES);
}

// SLICES follows from the columns alone, so that sums are added up in one order whatever the batch. The rest are those
// that were fastest of some on an H100 for a batch of 64 (docs/LOG.md): blocks enough for all multiprocessors, none
// left over for a second round, and each of at most 99 KiB of shared memory, which every GPU from 8.0 on has.
template <Into INTO>
cudaError_t by_size(const Projection& a, cudaStream_t stream) {
  const int tiles = (a.batch + 7) / 8;
  if (a.columns <= 1024) {
    if (tiles == 1) return launch<INTO, 4, 1, 1, 6, 3>(a, stream);
    if (tiles == 2 || INTO == Into::residual) return launch<INTO, 4, 2, 1, 6, 3>(a, stream);
    if constexpr (INTO == Into::qkv) {
      return launch<INTO, 4, 2, 2, 6, 2>(a, stream);
    } else if constexpr (INTO == Into::logits) {
      return launch<INTO, 4, 8, 4, 3, 1>(a, stream);
    } else if constexpr (INTO != Into::residual) {
      return launch<INTO, 4, 4, 2, 4, 2>(a, stream);
    }
  }
  if (tiles == 1) {  // nine turns are all of 2176 columns
    const bool room = Shape<INTO, 8, 1, 1, 9, 3>::BYTES <= shared_memory();
    return room ? launch<INTO, 8, 1, 1, 9, 3>(a, stream) : launch<INTO, 8, 1, 1, 6, 3>(a, stream);
  }
  if (tiles == 2 || INTO == Into::residual) return launch<INTO, 8, 2, 1, 6, 2>(a, stream);
  if constexpr (INTO != Into::residual) return launch<INTO, 8, 4, 2, 3, 1>(a, stream);
  return cudaErrorInvalidValue;
}

// What all products share: weight [rows, columns] of in [batch, columns].
Projection arguments(const View& in, const std::optional<View>& norm, double eps, const View& weight,
                     const std::optional<View>& bias) {
  Projection a = {};
  a.batch = check_batch(in, "the input");
  REQUIRE(weight.dims == 2, "weight must be [rows, columns], not ", shape(weight));
  const int64_t rows = weight.sizes[0], columns = in.sizes[1];
  REQUIRE(columns % 8 == 0 && columns >= 8 && columns <= MOST_ELEMENTS && rows >= 1 && rows <= MOST_ELEMENTS,
          "a weight of shape ", shape(weight), ": its columns must be a multiple of 8, both at most ", MOST_ELEMENTS);
  check_dense(in, "the input", in, {a.batch, columns});
  check_dense(weight, "weight", in, {rows, columns});
  if (norm) check_dense(*norm, "norm", in, {columns});
  if (bias) check_dense(*bias, "bias", in, {rows});
  a.in = in.data, a.weight = weight.data;
  a.norm = norm ? norm->data : nullptr;
  a.bias = bias ? bias->data : nullptr;
  a.eps = static_cast<float>(eps);
  a.rows = static_cast<int>(rows), a.columns = static_cast<int>(columns);
  return a;
}

}  // namespace

cudaError_t decode_qkv_(cudaStream_t stream, View x, View norm, double eps, View weight, std::optional<View> bias,
                        std::optional<View> cos, std::optional<View> sin, View position, Out q, Out k_cache,
                        Out v_cache) {
  Projection a = arguments(x, norm, eps, weight, bias);
  check_batch(q, "q");
  check_dense(q, "q", x, {a.batch, q.sizes[1]});
  check_caches(k_cache, v_cache, q);
  const int64_t kv_rows = k_cache.sizes[2] * k_cache.sizes[3];
  check(weight, "weight", x, {q.sizes[1] + 2 * kv_rows, a.columns});
  a.q_rows = static_cast<int>(q.sizes[1]), a.kv_rows = static_cast<int>(kv_rows);
  check(position, "position", x, {a.batch}, Type::int64);
  check_angles(cos, sin, k_cache);
  a.head_size = static_cast<int>(k_cache.sizes[3]);
  if (cos) a.cos = cos->as<float>(), a.sin = sin->as<float>();
  a.position = position.as<int64_t>();
  a.out = q.out(), a.k_cache = k_cache.out(), a.v_cache = v_cache.out();
  a.cache_batch = k_cache.strides[0], a.cache_position = k_cache.strides[1];
  return by_size<Into::qkv>(a, stream);
}

cudaError_t decode_add_projection_(cudaStream_t stream, View in, View weight, std::optional<View> bias, Out x) {
  Projection a = arguments(in, std::nullopt, 0, weight, bias);
  check_dense(x, "x", in, {a.batch, a.rows});
  a.out = x.out();
  return by_size<Into::residual>(a, stream);
}

cudaError_t decode_mlp_(cudaStream_t stream, View x, View norm, double eps, View weight, std::optional<View> bias,
                        bool gated, Out hidden) {
  Projection a = arguments(x, norm, eps, weight, bias);
  REQUIRE(!gated || a.rows % 16 == 0, "gate and up must have a multiple of 8 rows each, not ", a.rows, " together");
  check_dense(hidden, "hidden", x, {a.batch, gated ? a.rows / 2 : a.rows});
  a.out = hidden.out();
  return gated ? by_size<Into::gated>(a, stream) : by_size<Into::gelu>(a, stream);
}

cudaError_t decode_logits_(cudaStream_t stream, View x, View norm, double eps, View table, Out logits) {
  Projection a = arguments(x, norm, eps, table, std::nullopt);
  check_dense(logits, "logits", x, {a.batch, a.rows}, Type::float32);
  a.out = logits.out();
  return by_size<Into::logits>(a, stream);
}

}  // namespace mtlm
