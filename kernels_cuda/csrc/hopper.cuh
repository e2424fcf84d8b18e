// Hopper's own instructions (sm_90a): barriers in shared memory, the copy engine (TMA) and the tensor cores of a
// warpgroup (wgmma). Addresses in shared memory are 32-bit; matrices there are blocks of rows of 128 bytes, swizzled,
// which begin at multiples of 1,024.
#pragma once

#include <cuda.h>
#include <dlfcn.h>

#include "common.cuh"

namespace mtlm::hopper {

constexpr int ROW_BYTES = 128, K_BLOCK = 64;  // a row of 64 bf16; elements of the inner dimension per stage

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and says how many bytes the copy engine will add.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives at the barrier that a block of the cluster has at this address.
__device__ __forceinline__ void arrive_in(uint32_t barrier, int rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Named barriers of two warpgroups: one waits, the other lets it go on.
__device__ __forceinline__ void wait_for_turn(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void give_turn(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- the copy engine: boxes of a matrix, from column x and row y; beyond its edges it reads 0 and writes nothing

__device__ __forceinline__ void load_box(const CUtensorMap* map, uint32_t to, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

// To the same address in both blocks of a cluster, and the bytes to the barrier of each.
__device__ __forceinline__ void load_box_for_both(const CUtensorMap* map, uint32_t to, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(static_cast<uint16_t>(3)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void prefetch_box(const CUtensorMap* map, int x, int y) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(x), "r"(y) : "memory");
}

__device__ __forceinline__ void store_box(const CUtensorMap* map, uint32_t from, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
               "r"(x), "r"(y)
               : "memory");
}
__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until all but the newest PENDING groups of this thread's stores have left shared memory.
template <int PENDING>
__device__ __forceinline__ void wait_for_stores_to_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void wait_for_stores() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Between what a thread wrote and the copy engine that reads it.
__device__ __forceinline__ void publish_to_copy_engine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- tensor cores

// A matrix in shared memory. By rows: the inner dimension goes along the row. BY_COLUMNS: along it go 64 outer
// elements; blocks of 64 are 8,192 bytes (64 k) apart.
template <bool BY_COLUMNS>
__device__ __forceinline__ uint64_t describe(uint32_t address) {
  constexpr uint64_t SWIZZLE_128 = 1ull << 62, GROUP = 8 * ROW_BYTES / 16, BLOCK = K_BLOCK * ROW_BYTES / 16;
  return (address & 0x3ffff) >> 4 | (BY_COLUMNS ? BLOCK : 1) << 16 | GROUP << 32 | SWIZZLE_128;
}

// From one step of 16 k to the next, in a description.
template <bool BY_COLUMNS>
constexpr int STEP = (BY_COLUMNS ? 16 * ROW_BYTES : 16 * 2) / 16;

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define REGISTERS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define REGISTERS_16(d, i) REGISTERS_4(d, i), REGISTERS_4(d, i + 4), REGISTERS_4(d, i + 8), REGISTERS_4(d, i + 12)

// d [64, 128] = a [64, 16] b [16, 128], added to what it was if `add`. Lane l of warp w has in d[4j .. 4j + 3] the
// columns 8j + 2 (l % 4) and the next of row 16w + l / 4, then of row 16w + 8 + l / 4.
template <bool B_BY_COLUMNS>
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, add, 1, 1, 0, %67;\n}\n"
      : REGISTERS_16(d, 0), REGISTERS_16(d, 16), REGISTERS_16(d, 32), REGISTERS_16(d, 48)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(B_BY_COLUMNS)));
}

// The compiler knows of no wait: what reads the sums stays behind this.
__device__ __forceinline__ void settle(float (&d)[64]) {
  asm volatile("" : REGISTERS_16(d, 0), REGISTERS_16(d, 16), REGISTERS_16(d, 32), REGISTERS_16(d, 48)::"memory");
}

#undef REGISTERS_16
#undef REGISTERS_4

// Four 8 x 8 matrices in the layout of the sums, to or from rows whose addresses lanes 8i to 8i + 7 give for matrix i.
__device__ __forceinline__ void store_matrices(uint32_t row, const uint32_t (&m)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(m[0]), "r"(m[1]),
               "r"(m[2]), "r"(m[3])
               : "memory");
}
__device__ __forceinline__ void load_matrices(uint32_t row, uint32_t (&m)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(row)
               : "memory");
}

// ---- the host's side

// `rows` x `columns` bf16 whose rows are `stride` elements apart, in boxes of 64 columns.
inline CUtensorMap describe_matrix(const void* data, int64_t rows, int64_t columns, int64_t stride, int box_rows) {
  static const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
      dlsym(dlopen("libcuda.so.1", RTLD_LAZY), "cuTensorMapEncodeTiled"));
  REQUIRE(encode != nullptr, "the driver has no cuTensorMapEncodeTiled");
  // A call of the driver needs a context, which the runtime gives a thread with its first call that needs one: this can
  // be the first of a thread of autograd.
  int device;
  REQUIRE(cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess, "the GPU cannot be used");
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * stride)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  CUtensorMap map;
  const CUresult error =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  REQUIRE(error == CUDA_SUCCESS, "a matrix of [", rows, ", ", columns, "] cannot be read by the copy engine: error ",
          static_cast<int>(error));
  return map;
}

}  // namespace mtlm::hopper
