// A matrix product for Hopper whose results go through an epilogue: [rows, inner] times weights, by tiles of 128 x 128.
//
// Two warpgroups take turns: one multiplies its tile while the other's sums go through shared memory to where they
// belong. A third keeps a ring of stages full, 64 of the inner dimension each. Blocks are pairs along the rows: each
// loads half of the weights' tile and sends it to both. A block stays and takes every so-many-th tile, in the order of
// `place_of`. Sums are float32 and in the order of the inner dimension: a row's results do not depend on what else is
// in the matrix.
//
// An epilogue E has, for each warp, `begin`, called before a tile is multiplied, and `finish`, which gets the sums. It
// says how many STAGES the ring has, how many PIECES of staging and BARRIERS a warp has, how many columns of a result
// are in a tile (N), and whether a tile's HALVES are of two matrices of weights, or of one.
#pragma once

#include <algorithm>

#include "hopper.cuh"

namespace mtlm::hopper {

constexpr int TILE = 128, PAIR = 2, WARPGROUP = 128;
constexpr int OPERAND_BYTES = TILE * ROW_BYTES, STAGE_BYTES = 2 * OPERAND_BYTES;
constexpr int PIECE_ROWS = 16, PIECE_BYTES = PIECE_ROWS * ROW_BYTES;  // 16 x 64 elements, a warp's part of a store
constexpr int M_BLOCKS = TILE / 64, WARPS = 8, GROUP = 8;

// `Results`: what the epilogue reads or writes.
template <typename E>
struct Maps {
  CUtensorMap a, weights[2];
  typename E::Results results;
};

struct Sizes {
  int tiles_m, tiles_n, k_blocks;  // tiles: of both blocks of a pair

  __host__ __device__ int tiles() const { return tiles_m * tiles_n; }
};

struct Place {
  int m, n;
};

// The place of the tile that comes `turn`th. GROUP rows of tiles are taken together, one column after another: what
// the tiles in flight read is then a few MiB, which stay in the L2 cache, also where all weights do not fit there.
__device__ __forceinline__ Place place_of(Sizes sizes, int turn) {
  const int first = turn / (GROUP * sizes.tiles_n) * GROUP, rows = min(GROUP, sizes.tiles_m - first);
  turn -= first * sizes.tiles_n;
  return {first + turn % rows, turn / rows};
}

template <typename E>
constexpr int SHARED_BYTES = E::STAGES * STAGE_BYTES + WARPS * E::PIECES * PIECE_BYTES +
                             8 * (2 * E::STAGES + WARPS * E::BARRIERS) + 1024;  // the ring begins at a multiple

// Where a lane's rows of 16-byte chunks 2q and 2q + 1 are in a piece: matrices of 8 x 8, in the order of the sums.
__device__ __forceinline__ uint32_t place(uint32_t piece, int q, int lane) {
  return piece + (lane & 15) * ROW_BYTES + (((2 * q + (lane >> 4)) ^ (lane & 7)) << 4);
}

// Half of a pair's tile of weights, for both of its blocks: 64 of its outer elements, or 32 k of all where those are
// neighbours in memory (BY_COLUMNS). The tile's two halves are of two matrices, or of one.
template <typename E, bool BY_COLUMNS>
__device__ __forceinline__ void load_weights(const Maps<E>& maps, uint32_t to, uint32_t barrier, int tile, int k,
                                             int rank) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const CUtensorMap* map = &maps.weights[half % E::HALVES];
    const uint32_t block = to + half * (OPERAND_BYTES / 2);
    const int outer = tile * E::N + (E::HALVES == 1 ? half * 64 : 0);
    if constexpr (BY_COLUMNS) {
      load_box_for_both(map, block + rank * (OPERAND_BYTES / 4), barrier, outer, k + rank * (K_BLOCK / 2));
    } else if (half == rank) {
      load_box_for_both(map, block, barrier, k, outer);
    }
  }
}

// One thread's part: it tells the copy engine what to load. A pair of blocks takes every `pairs`th pair of tiles.
template <typename E, bool BY_COLUMNS>
__device__ __forceinline__ void keep_full(const Maps<E>& maps, Sizes sizes, uint32_t ring, uint32_t full,
                                          uint32_t empty) {
  const int rank = blockIdx.x % PAIR, pairs = gridDim.x / PAIR;
  int stage = 0, parity = 1;
  for (int turn = blockIdx.x / PAIR; turn < sizes.tiles(); turn += pairs) {
    const Place tile = place_of(sizes, turn);
    const int row = (tile.m * PAIR + rank) * TILE;
    for (int block = 0; block < sizes.k_blocks; ++block) {
      const uint32_t to = ring + stage * STAGE_BYTES, barrier = full + 8 * stage;
      wait(empty + 8 * stage, parity);
      expect_bytes(barrier, STAGE_BYTES);
      load_box(&maps.a, to, barrier, block * K_BLOCK, row);
      load_weights<E, BY_COLUMNS>(maps, to + OPERAND_BYTES, barrier, tile.n, block * K_BLOCK, rank);
      if (++stage == E::STAGES) stage = 0, parity ^= 1;
    }
  }
}

// A warpgroup's part: every second pair of tiles, in turn with the other.
template <typename E, bool BY_COLUMNS>
__device__ __forceinline__ void take_turns(const Maps<E>& maps, Sizes sizes, E epilogue, int group, uint32_t ring,
                                           uint32_t full, uint32_t empty) {
  const int rank = blockIdx.x % PAIR, pairs = gridDim.x / PAIR, thread = threadIdx.x % WARPGROUP;
  const uint64_t a = describe<false>(ring), b = describe<BY_COLUMNS>(ring + OPERAND_BYTES);
  const auto release = [&](int stage) {
    if (thread < PAIR) arrive_in(empty + 8 * stage, thread);
  };
  uint32_t blocks_before = 0;  // of the ring, of both warpgroups
  const int first = blockIdx.x / PAIR;
  for (int turn = first, own = 0; turn < sizes.tiles(); turn += pairs, ++own, blocks_before += sizes.k_blocks) {
    if (own % 2 != group) continue;
    const Place tile = place_of(sizes, turn);
    const int row = (tile.m * PAIR + rank) * TILE + thread / 32 * PIECE_ROWS;
    epilogue.begin(maps.results, tile.n, row);
    if (own > 0) wait_for_turn(1 + group);
    int stage = blocks_before % E::STAGES, parity = blocks_before / E::STAGES % 2, previous = 0;
    float sums[M_BLOCKS][64];
    for (int block = 0; block < sizes.k_blocks; ++block) {
      wait(full + 8 * stage, parity);
      const uint64_t offset = static_cast<uint64_t>(stage) * (STAGE_BYTES / 16);
      begin_products();
#pragma unroll
      for (int k = 0; k < K_BLOCK / 16; ++k) {
#pragma unroll
        for (int m = 0; m < M_BLOCKS; ++m) {
          multiply<BY_COLUMNS>(sums[m], a + offset + m * (64 * ROW_BYTES / 16) + k * STEP<false>,
                               b + offset + k * STEP<BY_COLUMNS>, block > 0 || k > 0);
        }
      }
      commit_products();
      wait_for_products<1>();
      if (block > 0) release(previous);
      previous = stage;
      if (++stage == E::STAGES) stage = 0, parity ^= 1;
    }
    if (turn + pairs < sizes.tiles()) give_turn(2 - group);
    wait_for_products<0>();
#pragma unroll
    for (int m = 0; m < M_BLOCKS; ++m) settle(sums[m]);
    release(previous);
    epilogue.finish(maps.results, tile.n, row, sums);
  }
  if (epilogue.lane == 0) wait_for_stores();
}

template <typename E, bool BY_COLUMNS>
__global__ void __launch_bounds__(3 * WARPGROUP, 1)
    product(const __grid_constant__ Maps<E> maps, const __grid_constant__ Sizes sizes) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ uint8_t memory[];
  const uint32_t ring = (shared_address(memory) + 1023) & ~1023u, pieces = ring + E::STAGES * STAGE_BYTES;
  const uint32_t full = pieces + WARPS * E::PIECES * PIECE_BYTES, empty = full + 8 * E::STAGES;
  const uint32_t of_epilogue = empty + 8 * E::STAGES;
  const int warp = __shfl_sync(ALL_LANES, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < E::STAGES; ++i) {
      init_barrier(full + 8 * i, 1);
      init_barrier(empty + 8 * i, PAIR);  // a warpgroup of each block of the pair
    }
    for (int i = 0; i < WARPS * E::BARRIERS; ++i) init_barrier(of_epilogue + 8 * i, 1);
    publish_barriers();
  }
  cluster_sync();
  if (warp < WARPGROUP / 32) {
    give_registers<40>();
    if (warp == 0 && lane == 0) keep_full<E, BY_COLUMNS>(maps, sizes, ring, full, empty);
    __syncwarp();
  } else {
    take_registers<232>();
    const int own = warp - WARPGROUP / 32;
    const E epilogue{pieces + own * E::PIECES * PIECE_BYTES, of_epilogue + own * E::BARRIERS * 8, lane};
    take_turns<E, BY_COLUMNS>(maps, sizes, epilogue, own / 4, ring, full, empty);
    __syncwarp();
  }
  cluster_sync();  // no block of a pair ends while the other may still write or arrive in it
#else
  __trap();  // code of another architecture, translated for this one: the frameworks' sides ask for it beforehand
#endif
}

template <typename E, bool BY_COLUMNS>
cudaError_t launch(cudaStream_t stream, const Maps<E>& maps, int64_t rows, int64_t width, int64_t inner) {
  int device = 0, processors = 0, major = 0, minor = 0, pairs = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  REQUIRE(major == 9 && minor == 0, "these products run on compute capability 9.0, not ", major, ".", minor);
  const auto kernel = product<E, BY_COLUMNS>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES<E>);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = PAIR, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.blockDim = 3 * WARPGROUP, config.dynamicSmemBytes = SHARED_BYTES<E>, config.stream = stream;
  config.attrs = &cluster, config.numAttrs = 1;
  config.gridDim = processors / PAIR * PAIR;
  error = cudaOccupancyMaxActiveClusters(&pairs, kernel, &config);
  if (error != cudaSuccess) return error;
  const int64_t tiles_m = (rows + PAIR * TILE - 1) / (PAIR * TILE), tiles_n = (width + E::N - 1) / E::N;
  const int64_t tiles = tiles_m * tiles_n;
  REQUIRE(rows <= MOST_BLOCKS / 2 && tiles <= MOST_BLOCKS / 2, "a product of [", rows, ", ", width, "] is too large");
  const int k_blocks = static_cast<int>((inner + K_BLOCK - 1) / K_BLOCK);
  const Sizes sizes{static_cast<int>(tiles_m), static_cast<int>(tiles_n), k_blocks};
  config.gridDim = PAIR * static_cast<int>(std::min<int64_t>(pairs, tiles));
  return cudaLaunchKernelEx(&config, kernel, maps, sizes);
}

// BY_COLUMNS as a value.
template <typename E>
cudaError_t launch(cudaStream_t stream, const Maps<E>& maps, bool by_columns, int64_t rows, int64_t width,
                   int64_t inner) {
  return by_columns ? launch<E, true>(stream, maps, rows, width, inner)
                    : launch<E, false>(stream, maps, rows, width, inner);
}

}  // namespace mtlm::hopper
