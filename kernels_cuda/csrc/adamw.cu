// AdamW (Loshchilov and Hutter 2019) over many tensors a launch, every quantity of the step on the device.
//
//   g = grad * grad_scale      m += (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2
//   param = param (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Clipping is `grad_scale`, leaving an update out is `skip`, the schedule is `lr`: device scalars, so that a step
// neither waits for the host nor is recorded anew in a CUDA graph. Parameters and moments are float32, gradients
// float32 or bfloat16; a bfloat16 copy of a parameter is written where the network computes with one.
// Bytes a parameter: 28 (16 read, 12 written), as much with bfloat16 gradients and copies (14 and 14).
// Elementwise: equal from run to run.
#include "common.cuh"

#include <cmath>

namespace mtlm {
namespace {

constexpr int THREADS = 256;
constexpr int N = 4;                       // elements of an access: 16 bytes of float32
constexpr int64_t BLOCK = THREADS * N * 4; // elements of a block
constexpr int MOST = 48;                   // tensors of a launch: kernel arguments end at 4 KiB

struct AdamWTensor {
  float* param;
  const void* grad;
  float* exp_avg;
  float* exp_avg_sq;
  void* copy;  // bfloat16, or null
  int64_t size;
  Type grad_type;
};

struct AdamWSettings {
  const float* lr;            // device scalars
  const float* step;          // the number of this update, from 1
  const float* grad_scale;    // multiplies every gradient
  const bool* skip;           // nothing is changed
  float beta2, rest1, rest2;  // 1 - beta of each, rounded once: 1.0f - 0.9999f is off by 1.7e-4 of itself
  float log_beta1, log_beta2, eps, weight_decay;
};

struct Batch {
  AdamWTensor tensors[MOST];
  unsigned first_block[MOST + 1];
  unsigned vectors[(MOST + 31) / 32];  // bit i: tensor i is aligned
  int count;
};
static_assert(sizeof(Batch) + sizeof(AdamWSettings) <= 4096);

struct Rates {
  float shrink, rate, sqrt_correction2, grad_scale;
};

__device__ __forceinline__ void update(float& p, float g, float& m, float& v, const AdamWSettings& s,
                                       const Rates& r) {
  g *= r.grad_scale;
  m += s.rest1 * (g - m);
  v = s.beta2 * v + s.rest2 * g * g;
  p = p * r.shrink - r.rate * (m / (sqrtf(v) / r.sqrt_correction2 + s.eps));
}

template <typename G, int M>
__device__ __forceinline__ void update_at(const AdamWTensor& t, int64_t at, const AdamWSettings& s, const Rates& r) {
  float p[M], g[M], m[M], v[M];
  load<float, M>(t.param + at, p);
  load<G, M>(static_cast<const G*>(t.grad) + at, g);
  load<float, M>(t.exp_avg + at, m);
  load<float, M>(t.exp_avg_sq + at, v);
#pragma unroll
  for (int i = 0; i < M; ++i) update(p[i], g[i], m[i], v[i], s, r);
  store<float, M>(t.param + at, p);
  store<float, M>(t.exp_avg + at, m);
  store<float, M>(t.exp_avg_sq + at, v);
  if (t.copy != nullptr) store<bf16, M>(static_cast<bf16*>(t.copy) + at, p);
}

template <typename G>
__device__ void update_block(const AdamWTensor& t, int64_t begin, bool vectors, const AdamWSettings& s,
                             const Rates& r) {
  const int64_t end = begin + BLOCK < t.size ? begin + BLOCK : t.size;
  if (!vectors) {
    for (int64_t at = begin + threadIdx.x; at < end; at += THREADS) update_at<G, 1>(t, at, s, r);
    return;
  }
  const int64_t whole = begin + (end - begin) / N * N;
#pragma unroll 2
  for (int64_t at = begin + threadIdx.x * N; at < whole; at += THREADS * N) update_at<G, N>(t, at, s, r);
  if (threadIdx.x < end - whole) update_at<G, 1>(t, whole + threadIdx.x, s, r);
}

__global__ __launch_bounds__(THREADS) void step(const __grid_constant__ Batch batch,
                                                const __grid_constant__ AdamWSettings s) {
  if (*s.skip) return;
  int low = 0, high = batch.count;  // the tensor whose blocks include this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (batch.first_block[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const AdamWTensor& t = batch.tensors[low];
  const float lr = *s.lr, count = *s.step;
  // 1 - beta^t without cancellation.
  const float correction1 = -expm1f(count * s.log_beta1), correction2 = -expm1f(count * s.log_beta2);
  const Rates rates = {1.0f - lr * s.weight_decay, lr / correction1, sqrtf(correction2), *s.grad_scale};
  const int64_t begin = (blockIdx.x - batch.first_block[low]) * BLOCK;
  const bool vectors = batch.vectors[low / 32] >> (low % 32) & 1;
  if (t.grad_type == Type::bfloat16) {
    update_block<bf16>(t, begin, vectors, s, rates);
  } else {
    update_block<float>(t, begin, vectors, s, rates);
  }
}

// One of the tensors that belong to a parameter.
void check_state(const View& t, const char* name, const View& param, Type type) {
  REQUIRE(t.device >= 0 && t.device == param.device, name, " is on another device");
  REQUIRE(t.type == type && t.contiguous && t.count == param.count, name, " must be ", name_of(type),
          ", contiguous and of ", param.count, " elements, not ", name_of(t.type), " of ", t.count);
}

template <typename T>
const T* scalar(const View& t, const char* name, Type type, const View& param) {
  REQUIRE(t.device >= 0 && t.device == param.device && t.count == 1 && t.type == type, name, " must be one ",
          name_of(type), " on the parameters' device");
  return t.as<T>();
}

}  // namespace

cudaError_t adamw_(cudaStream_t stream, const std::vector<Out>& params, const std::vector<View>& grads,
                   const std::vector<Out>& exp_avgs, const std::vector<Out>& exp_avg_sqs,
                   const std::vector<Out>& copies, View lr, View step_number, View grad_scale, View skip,
                   double beta1, double beta2, double eps, double weight_decay) {
  const size_t count = params.size();
  REQUIRE(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
              (copies.empty() || copies.size() == count),
          "there are ", count, " parameters, ", grads.size(), " gradients, ", exp_avgs.size(), " and ",
          exp_avg_sqs.size(), " moments, ", copies.size(), " copies");
  if (count == 0) return cudaSuccess;
  const View& first = params[0];
  const auto narrow = [](double x) { return static_cast<float>(x); };
  const AdamWSettings settings = {scalar<float>(lr, "lr", Type::float32, first),
                                  scalar<float>(step_number, "step", Type::float32, first),
                                  scalar<float>(grad_scale, "grad_scale", Type::float32, first),
                                  scalar<bool>(skip, "skip", Type::boolean, first),
                                  narrow(beta2), narrow(1 - beta1), narrow(1 - beta2), narrow(std::log(beta1)),
                                  narrow(std::log(beta2)), narrow(eps), narrow(weight_decay)};
  for (size_t i = 0; i < count; ++i) {  // all of them before the first is changed
    REQUIRE(params[i].device == first.device, "parameters are on several devices");
    check_state(params[i], "a parameter", params[i], Type::float32);
    check_state(exp_avgs[i], "exp_avg", params[i], Type::float32);
    check_state(exp_avg_sqs[i], "exp_avg_sq", params[i], Type::float32);
    if (!copies.empty()) check_state(copies[i], "a copy", params[i], Type::bfloat16);
    float_type(grads[i], "a gradient");
    REQUIRE(grads[i].device == first.device && grads[i].contiguous && grads[i].count == params[i].count, "gradient ",
            i, " must be contiguous, of ", params[i].count, " elements, on the same device");
  }
  Batch batch = {};
  int64_t blocks = 0;
  const auto launch = [&]() {
    if (blocks > 0) step<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(batch, settings);
    batch = {}, blocks = 0;
    return cudaGetLastError();
  };
  for (size_t i = 0; i < count; ++i) {
    const AdamWTensor t = {params[i].out<float>(), grads[i].data, exp_avgs[i].out<float>(),
                           exp_avg_sqs[i].out<float>(), copies.empty() ? nullptr : copies[i].out(),
                           params[i].count, grads[i].type};
    if (t.size == 0) continue;
    const int64_t needs = (t.size + BLOCK - 1) / BLOCK;  // a tensor of 2^43 elements is not expected
    if (batch.count == MOST || blocks + needs > MOST_BLOCKS) {
      const cudaError_t error = launch();
      if (error != cudaSuccess) return error;
    }
    const bool whole = aligned(t.param, 16) && aligned(t.grad, 16) && aligned(t.exp_avg, 16) &&
                       aligned(t.exp_avg_sq, 16) && aligned(t.copy, 16);
    batch.tensors[batch.count] = t;
    batch.first_block[batch.count] = static_cast<unsigned>(blocks);
    batch.vectors[batch.count / 32] |= static_cast<unsigned>(whole) << (batch.count % 32);
    blocks += needs;
    batch.first_block[++batch.count] = static_cast<unsigned>(blocks);
  }
  return launch();
}

}  // namespace mtlm
