// The CUDA implementations of the ops that kernels_cuda/ops/ declares, over LibTorch's stable ABI: one file for every
// PyTorch from 2.10 on. An op is one line at the end: the name and the argument types of its launcher, which follow
// the schema (Tensor: View, or Out where it is written; Tensor?: std::optional; Tensor[]: std::vector).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "op.h"

namespace mtlm {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return Type::bfloat16;
    case ScalarType::Float: return Type::float32;
    case ScalarType::Long: return Type::int64;
    case ScalarType::Bool: return Type::boolean;
    default: return Type::other;
  }
}

View view(const Tensor& t, const void* data) {
  int64_t *sizes = nullptr, *strides = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
  const int device = t.is_cuda() ? t.get_device_index() : -1;
  return {data, type_of(t), device, static_cast<int>(t.dim()), sizes, strides, t.numel(), t.is_contiguous()};
}

// How a launcher's argument of type A comes out of PyTorch's, of type `From`. Numbers stay what they are.
template <typename A>
struct Argument {
  using From = A;
  static A make(const A& value) { return value; }
};

template <>
struct Argument<View> {
  using From = Tensor;
  static View make(const Tensor& t) { return view(t, t.const_data_ptr()); }
};

template <>
struct Argument<Out> {
  using From = Tensor;
  static Out make(const Tensor& t) { return {view(t, t.mutable_data_ptr())}; }
};

template <typename A>
struct Argument<std::optional<A>> {
  using From = std::optional<typename Argument<A>::From>;
  static std::optional<A> make(const From& t) { return t ? std::optional<A>(Argument<A>::make(*t)) : std::nullopt; }
};

template <typename A>
struct Argument<std::vector<A>> {
  using From = std::vector<typename Argument<A>::From>;
  static std::vector<A> make(const From& all) {
    std::vector<A> made;
    made.reserve(all.size());
    for (const auto& t : all) made.push_back(Argument<A>::make(t));
    return made;
  }
};

// The GPU of the first tensor among the arguments, -1 without one.
int device_of() { return -1; }

template <typename First, typename... Rest>
int device_of(const First& first, const Rest&... rest) {
  if constexpr (std::is_base_of_v<View, First>) {
    return first.device;
  } else if constexpr (std::is_same_v<First, std::vector<View>> || std::is_same_v<First, std::vector<Out>>) {
    return first.empty() ? device_of(rest...) : first[0].device;
  } else {
    return device_of(rest...);
  }
}

// The launcher as PyTorch calls it: on the device of the first tensor, on PyTorch's current stream.
template <auto LAUNCHER, const char* NAME>
struct Op;

template <typename... A, cudaError_t (*LAUNCHER)(cudaStream_t, A...), const char* NAME>
struct Op<LAUNCHER, NAME> {
  static void call(typename Argument<std::decay_t<A>>::From... arguments) {
    run(Argument<std::decay_t<A>>::make(arguments)...);
  }

  static void run(const std::decay_t<A>&... arguments) {
    const int device = device_of(arguments...);
    STD_TORCH_CHECK(device >= 0, "mtlm::", NAME, ": the first tensor is not on a GPU");
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    cudaGetLastError();  // an earlier call's, which was raised: the launcher would take it for its own
    const cudaError_t error = LAUNCHER(static_cast<cudaStream_t>(stream), arguments...);
    STD_TORCH_CHECK(error == cudaSuccess, "mtlm::", NAME, ": ", cudaGetErrorString(error));
  }
};

}  // namespace

#define OP(NAME, ...)                                 \
  cudaError_t NAME(cudaStream_t stream, __VA_ARGS__); \
  static constexpr char NAME##_name[] = #NAME;        \
  STABLE_TORCH_LIBRARY_IMPL(mtlm, CUDA, m) { m.impl(#NAME, TORCH_BOX((&Op<&NAME, NAME##_name>::call))); }

using MaybeView = std::optional<View>;
using Views = const std::vector<View>&;
using Outs = const std::vector<Out>&;

OP(rms_norm_into, View, View, double, Out, Out)
OP(add_rms_norm_into, View, View, View, double, Out, Out, Out)
OP(rms_norm_backward_into, View, MaybeView, View, View, View, Out, Out, Out, Out)
OP(rotary_, Out, Out, View, View, bool)
OP(rotary_pack_into, View, View, View, MaybeView, MaybeView, bool, Out)
OP(qkv_product_into, View, View, MaybeView, MaybeView, MaybeView, bool, Out, Out, Out)
OP(softmax_loss_, Out, View, Out, Out, double, bool)
OP(loss_product_into, View, View, View, double, Out, Out, Out, Out, Out, Out)
OP(adamw_, Outs, Views, Outs, Outs, Outs, View, View, View, View, double, double, double, double)
OP(swiglu_product_into, View, View, bool, Out, Out)
OP(swiglu_product_backward_into, View, View, bool, View, Out, Out)
OP(gelu_product_into, View, View, View, bool, Out, Out)
OP(gelu_product_backward_into, View, View, bool, View, Out, Out, Out)
OP(decode_embed_, View, View, View, MaybeView, Out)
OP(decode_qkv_, View, View, double, View, MaybeView, MaybeView, MaybeView, View, Out, Out, Out)
OP(decode_qk_norm_, View, View, double, MaybeView, MaybeView, View, Out, Out)
OP(decode_attention_, View, View, View, View, Out)
OP(decode_add_projection_, View, View, MaybeView, Out)
OP(decode_mlp_, View, View, double, View, MaybeView, bool, Out)
OP(decode_logits_, View, View, double, View, Out)
OP(decode_sample_, View, View, View, int64_t, Out, Out)

}  // namespace mtlm
