// Parts of the kernels of one decoding step: reads that stay where they are written, and programmatic dependent
// launch. A step is a chain of small kernels, each waiting for the one before; on compute capability 9.0 the next
// one's blocks are placed early, fetch what no kernel writes (weights), and only then wait.
//
// Before `wait_for_previous` a kernel reads only what no kernel writes that may still run: the weights.
// The kernels of embedding and qkv let the next one be launched only after their own wait: so when qkv begins the
// step before is over, and when attention (or the norm of queries and keys before it) begins, so are the layers
// before. Positions can be read before every wait but the embedding's, and by attention the older entries of the
// cache.
#pragma once

#include <utility>

#include "common.cuh"

namespace mtlm {

// All kernels before this one are over, and what they wrote can be read.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel's blocks may be placed once every block of this one has come here or ended.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 16 bytes from the second-level cache, where other kernels' stores are. Strong and volatile: these reads stay on
// their side of the wait, so they also serve for weights that are to be asked for before it.
__device__ __forceinline__ uint4 read_fresh(const bf16* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// One element of the same.
__device__ __forceinline__ float read_fresh_element(const bf16* p) {
  unsigned short bits;
  asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(bits) : "l"(p));
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}

__device__ __forceinline__ int64_t read_fresh(const int64_t* p) {
  int64_t value;
  asm volatile("ld.global.cg.s64 %0, [%1];" : "=l"(value) : "l"(p));
  return value;
}

__device__ __forceinline__ void as_floats(const uint4& v, float (&out)[8]) {
  const unsigned word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = __uint_as_float(word[i] << 16);
    out[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
}

// 16 bytes from the second-level cache into shared memory, or zeros, while the thread continues.
__device__ __forceinline__ void copy_or_zero(uint4* to, const void* from, bool there) {
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Those since the last call are one group.
__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but this thread's last GROUPS groups are there.
template <int GROUPS>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}

// Whether a kernel has the instructions above: what the compiler saw of it, not what the GPU could run. Code for 8.0
// that the driver translates for a newer GPU has neither waits nor clusters.
template <typename Args>
bool has_early_launch(void (*kernel)(Args)) {
  cudaFuncAttributes compiled = {};
  return cudaFuncGetAttributes(&compiled, kernel) == cudaSuccess && compiled.ptxVersion >= 90;
}

// Launches a kernel of the chain; `cluster` blocks form one cluster.
template <typename Args>
cudaError_t launch_chained(void (*kernel)(Args), const Args& args, int64_t blocks, int threads, int cluster,
                           cudaStream_t stream, int shared_bytes = 0) {
  // One division of the multiprocessor's memory for all: another one waits until it is empty.
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (shared_bytes > 0) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (has_early_launch(kernel)) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    if (cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim.x = cluster;
      attributes[config.numAttrs].val.clusterDim.y = 1;
      attributes[config.numAttrs++].val.clusterDim.z = 1;
    }
  }
  return cudaLaunchKernelEx(&config, kernel, args);
}

constexpr int64_t MOST_ROWS = 64;  // of the batch: eight tiles of the tensor cores

// Contiguous, at a multiple of 16 bytes: a step makes no copies, so anything else is refused.
inline void check_dense(const View& t, const char* name, const View& like, std::initializer_list<int64_t> sizes,
                        Type type = Type::bfloat16) {
  check(t, name, like, sizes, type);
  REQUIRE(aligned(t.data, 16), name, " must begin at a multiple of 16 bytes");
}

inline int check_batch(const View& x, const char* name) {
  REQUIRE(x.dims == 2, name, " must be [batch, d], not ", shape(x));
  REQUIRE(x.sizes[0] >= 1 && x.sizes[0] <= MOST_ROWS, name, " has ", x.sizes[0], " rows; a step takes 1 to ",
          MOST_ROWS);
  return static_cast<int>(x.sizes[0]);
}

// Keys and values [batch, positions, kv heads, head size] for q [batch, heads * head size]: heads and their elements
// are contiguous; rows and positions lie anywhere, at multiples of 16 bytes, in both alike. A head of keys and values
// serves as many neighbouring heads of q as there are for each.
inline void check_caches(const View& keys, const View& values, const View& q) {
  for (const auto& [cache, name] : {std::pair(&keys, "k_cache"), std::pair(&values, "v_cache")}) {
    REQUIRE(cache->dims == 4, name, " must be [batch, positions, kv heads, head size], not ", shape(*cache));
    const int64_t heads = keys.sizes[2], size = keys.sizes[3];
    check(*cache, name, q, {q.sizes[0], keys.sizes[1], heads, size});
    REQUIRE(heads * size > 0 && q.sizes[1] > 0 && q.sizes[1] % (heads * size) == 0, name, " has ", heads,
            " heads of ", size, ", of which the width of q, ", q.sizes[1], ", is no multiple");
    REQUIRE(size % 16 == 0, "the head size must be a multiple of 16, not ", size);
    REQUIRE(cache->type == Type::bfloat16, name, " must be bfloat16, not ", name_of(cache->type));
    const int64_t* strides = cache->strides;
    REQUIRE(strides[3] == 1 && strides[2] == size && strides[0] % 8 == 0 && strides[1] % 8 == 0 &&
                aligned(cache->data, 16),
            name, " must have whole heads, at multiples of 16 bytes; the strides are ", shape(strides, 4));
    REQUIRE(strides[0] == keys.strides[0] && strides[1] == keys.strides[1],
            "k_cache and v_cache must have the same strides");
  }
}

// cos and sin of every position of a cache [batch, positions, kv heads, head size]; or neither, where nothing is
// rotated.
inline void check_angles(const std::optional<View>& cos, const std::optional<View>& sin, const View& cache) {
  REQUIRE(cos.has_value() == sin.has_value(), "cos and sin go together");
  if (!cos) return;
  const int64_t positions = cache.sizes[1], half = cache.sizes[3] / 2;
  REQUIRE(cos->dims == 2 && cos->sizes[0] >= positions, "cos must be [", positions, " or more, ", half, "], not ",
          shape(*cos));
  check_dense(*cos, "cos", cache, {cos->sizes[0], half}, Type::float32);
  check_dense(*sin, "sin", cache, {cos->sizes[0], half}, Type::float32);
}

}  // namespace mtlm
