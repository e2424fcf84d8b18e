// The kernels of a training step as XLA's custom calls (jax.ffi), for kernels_cuda/xla.py: a handler per op, by the
// name mtlm_OP. All arrays are row-major and whole. Nothing is allocated, nothing waits for the device, and nothing
// but kernels is launched, so XLA may record every call in a CUDA graph; the symbols say so.
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <exception>
#include <list>
#include <optional>
#include <vector>

#include "op.h"
#include "xla/ffi/api/ffi.h"

namespace mtlm {

cudaError_t rms_norm_into(cudaStream_t, View, View, double, Out, Out);
cudaError_t add_rms_norm_into(cudaStream_t, View, View, View, double, Out, Out, Out);
cudaError_t rms_norm_backward_into(cudaStream_t, View, std::optional<View>, View, View, View, Out, Out, Out, Out);
cudaError_t rotary_(cudaStream_t, Out, Out, View, View, bool);
cudaError_t rotary_pack_into(cudaStream_t, View, View, View, std::optional<View>, std::optional<View>, bool, Out);
cudaError_t rotary_unpack_into(cudaStream_t, View, std::optional<View>, std::optional<View>, bool, Out, Out, Out);
cudaError_t qkv_product_into(cudaStream_t, View, View, std::optional<View>, std::optional<View>, std::optional<View>,
                             bool, Out, Out, Out);
cudaError_t softmax_loss_(cudaStream_t, Out, View, Out, Out, double, bool);
cudaError_t loss_product_into(cudaStream_t, View, View, View, double, Out, Out, Out, Out, Out, Out);
cudaError_t swiglu_product_into(cudaStream_t, View, View, bool, Out, Out);
cudaError_t swiglu_product_backward_into(cudaStream_t, View, View, bool, View, Out, Out);
cudaError_t gelu_product_into(cudaStream_t, View, View, View, bool, Out, Out);
cudaError_t gelu_product_backward_into(cudaStream_t, View, View, bool, View, Out, Out, Out);
cudaError_t adamw_(cudaStream_t, const std::vector<Out>&, const std::vector<View>&, const std::vector<Out>&,
                   const std::vector<Out>&, const std::vector<Out>&, View, View, View, View, double, double, double,
                   double);

namespace {

namespace ffi = xla::ffi;
using In = ffi::AnyBuffer;
using Result = ffi::Result<ffi::AnyBuffer>;
using Stream = ffi::PlatformStream<cudaStream_t>;

Type type_of(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::BF16: return Type::bfloat16;
    case ffi::DataType::F32: return Type::float32;
    case ffi::DataType::S32: return Type::int32;
    case ffi::DataType::S64: return Type::int64;
    case ffi::DataType::PRED: return Type::boolean;
    default: return Type::other;
  }
}

// The arrays of one call as launchers take them. XLA has made the device of the call the current one, so that all
// of them are on "device 0" here.
class Arrays {
 public:
  Out operator()(const In& buffer) {
    const auto sizes = buffer.dimensions();
    const int dims = static_cast<int>(sizes.size());
    REQUIRE(dims <= MOST_DIMS, "an array has ", dims, " dimensions; at most ", MOST_DIMS);
    auto& strides = strides_.emplace_back();
    int64_t count = 1;
    for (int i = dims - 1; i >= 0; --i) {
      strides[i] = count;
      count *= sizes[i];
    }
    return {{buffer.untyped_data(), type_of(buffer.element_type()), 0, dims, sizes.begin(), strides.data(), count,
             true}};
  }

  Out operator()(Result buffer) { return (*this)(*buffer); }

  std::optional<View> operator()(const std::optional<In>& buffer) {
    return buffer ? std::optional<View>((*this)(*buffer)) : std::nullopt;
  }

 private:
  static constexpr int MOST_DIMS = 8;
  std::list<std::array<int64_t, MOST_DIMS>> strides_;  // a list: views point to its elements
};

// What a launcher says, as XLA has it.
template <typename Launch>
ffi::Error run(Launch launch) {
  try {
    cudaGetLastError();  // an earlier call's, which was returned: the launcher would take it for its own
    const cudaError_t error = launch();
    return error == cudaSuccess ? ffi::Error::Success() : ffi::Error::Internal(cudaGetErrorString(error));
  } catch (const std::exception& error) {
    return ffi::Error::InvalidArgument(error.what());
  }
}

ffi::Error rms_norm(cudaStream_t stream, In x, In weight, Result normed, Result rstd, double eps) {
  Arrays a;
  return run([&] { return rms_norm_into(stream, a(x), a(weight), eps, a(normed), a(rstd)); });
}

ffi::Error add_rms_norm(cudaStream_t stream, In residual, In branch, In weight, Result normed, Result sum,
                        Result rstd, double eps) {
  Arrays a;
  return run([&] {
    return add_rms_norm_into(stream, a(residual), a(branch), a(weight), eps, a(normed), a(sum), a(rstd));
  });
}

// The residual and the branch are of one type, so that one gradient serves both.
ffi::Error rms_norm_backward(cudaStream_t stream, In d_normed, In d_sum, In x, In rstd, In weight, Result d_x,
                             Result d_weight, Result partials) {
  Arrays a;
  return run([&] {
    const View x_view = a(x);
    REQUIRE(x_view.dims == 2, "x must be [rows, d], not ", shape(x_view));
    const int64_t no_rows[] = {0, x_view.sizes[1]};
    const Out d_branch = {{nullptr, x_view.type, 0, 2, no_rows, x_view.strides, 0, true}};
    return rms_norm_backward_into(stream, a(d_normed), a(d_sum), x_view, a(rstd), a(weight), a(d_x), d_branch,
                                  a(d_weight), a(partials));
  });
}

// In place: XLA gives q_out the memory of q, and k_out that of k.
ffi::Error rotary(cudaStream_t stream, In q, In k, In cos, In sin, Result q_out, Result k_out, bool conjugate) {
  Arrays a;
  return run([&] {
    REQUIRE(q_out->untyped_data() == q.untyped_data() && k_out->untyped_data() == k.untyped_data(),
            "q and k must be rotated in place");
    return rotary_(stream, a(q_out), a(k_out), a(cos), a(sin), conjugate);
  });
}

// cos and sin, which are all that remains from `first` on, or nothing.
std::optional<In> angles(const ffi::RemainingArgs& rest, size_t which, size_t first = 0) {
  if (rest.size() == first) return std::nullopt;
  const auto found = rest.get<In>(first + which);
  REQUIRE(found.has_value(), "cos and sin must be given both, or none");
  return *found;
}

ffi::Error rotary_pack(cudaStream_t stream, In q, In k, In v, ffi::RemainingArgs rest, Result packed,
                       bool conjugate) {
  Arrays a;
  return run([&] {
    return rotary_pack_into(stream, a(q), a(k), a(v), a(angles(rest, 0)), a(angles(rest, 1)), conjugate, a(packed));
  });
}

ffi::Error rotary_unpack(cudaStream_t stream, In packed, ffi::RemainingArgs rest, Result q, Result k, Result v,
                         bool conjugate) {
  Arrays a;
  return run([&] {
    return rotary_unpack_into(stream, a(packed), a(angles(rest, 0)), a(angles(rest, 1)), conjugate, a(q), a(k), a(v));
  });
}

// After the weight its bias, or none, and then the angles, or none.
ffi::Error qkv_product(cudaStream_t stream, In x, In weight, ffi::RemainingArgs rest, Result q, Result k, Result v) {
  Arrays a;
  return run([&] {
    const size_t biases = rest.size() % 2;
    const std::optional<In> bias = biases ? std::optional<In>(*rest.get<In>(0)) : std::nullopt;
    return qkv_product_into(stream, a(x), a(weight), a(bias), a(angles(rest, 0, biases)),
                            a(angles(rest, 1, biases)), true, a(q), a(k), a(v));
  });
}

// In place: the gradient gets the memory of the logits.
ffi::Error softmax_loss(cudaStream_t stream, In logits, In targets, Result d_logits, Result total, Result nll,
                        double z_loss) {
  Arrays a;
  return run([&] {
    REQUIRE(d_logits->untyped_data() == logits.untyped_data(), "the gradient must replace the logits");
    return softmax_loss_(stream, a(d_logits), a(targets), a(total), a(nll), z_loss, true);
  });
}

ffi::Error loss_product(cudaStream_t stream, In hidden, In table, In targets, Result exps, Result total, Result nll,
                        Result scale, Result shift, Result partials, double z_loss) {
  Arrays a;
  return run([&] {
    return loss_product_into(stream, a(hidden), a(table), a(targets), z_loss, a(exps), a(total), a(nll), a(scale),
                             a(shift), a(partials));
  });
}

ffi::Error swiglu_product(cudaStream_t stream, In x, In weight, Result gate_up, Result h) {
  Arrays a;
  return run([&] { return swiglu_product_into(stream, a(x), a(weight), true, a(gate_up), a(h)); });
}

ffi::Error swiglu_product_backward(cudaStream_t stream, In d, In down, In gate_up, Result d_gate_up, Result h) {
  Arrays a;
  return run([&] {
    return swiglu_product_backward_into(stream, a(d), a(down), true, a(gate_up), a(d_gate_up), a(h));
  });
}

ffi::Error gelu_product(cudaStream_t stream, In x, In weight, In bias, Result up, Result h) {
  Arrays a;
  return run([&] { return gelu_product_into(stream, a(x), a(weight), a(bias), true, a(up), a(h)); });
}

ffi::Error gelu_product_backward(cudaStream_t stream, In d, In down, In up, Result d_up, Result d_bias,
                                 Result partials) {
  Arrays a;
  return run([&] {
    return gelu_product_backward_into(stream, a(d), a(down), true, a(up), a(d_up), a(d_bias), a(partials));
  });
}

// After the scalars n parameters, n gradients, n first and n second moments; the results are all but the gradients,
// in the memory of what they replace.
ffi::Error adamw(cudaStream_t stream, In lr, In step, In grad_scale, In skip, ffi::RemainingArgs rest,
                 ffi::RemainingRets results, double beta1, double beta2, double eps, double weight_decay) {
  Arrays a;
  return run([&] {
    const size_t n = rest.size() / 4;
    REQUIRE(rest.size() == 4 * n && results.size() == 3 * n, "there are ", rest.size(), " arrays and ",
            results.size(), " results");
    std::vector<Out> written[3];
    std::vector<View> grads;
    for (size_t i = 0; i < rest.size(); ++i) {
      const size_t kind = i / n;
      const In given = *rest.get<In>(i);
      if (kind == 1) {
        grads.push_back(a(given));
        continue;
      }
      Result result = *results.get<In>(kind == 0 ? i : i - n);
      REQUIRE(result->untyped_data() == given.untyped_data(), "parameters and moments must be updated in place");
      written[kind == 0 ? 0 : kind - 1].push_back(a(result));
    }
    return adamw_(stream, written[0], grads, written[1], written[2], {}, a(lr), a(step), a(grad_scale), a(skip), beta1,
                  beta2, eps, weight_decay);
  });
}

}  // namespace

#define OP(NAME, BINDING) \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(mtlm_##NAME, NAME, BINDING, {ffi::Traits::kCmdBufferCompatible})

// clang-format off
OP(rms_norm, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Ret<In>().Ret<In>().Attr<double>("eps"));
OP(add_rms_norm, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Ret<In>().Ret<In>().Ret<In>()
                     .Attr<double>("eps"));
OP(rms_norm_backward, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Arg<In>().Arg<In>()
                          .Ret<In>().Ret<In>().Ret<In>());
OP(rotary, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Arg<In>().Ret<In>().Ret<In>()
               .Attr<bool>("conjugate"));
OP(rotary_pack, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().RemainingArgs().Ret<In>()
                    .Attr<bool>("conjugate"));
OP(rotary_unpack, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().RemainingArgs().Ret<In>().Ret<In>().Ret<In>()
                      .Attr<bool>("conjugate"));
OP(qkv_product, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().RemainingArgs().Ret<In>().Ret<In>().Ret<In>());
OP(softmax_loss, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Ret<In>().Ret<In>().Ret<In>()
                     .Attr<double>("z_loss"));
OP(loss_product, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Ret<In>().Ret<In>().Ret<In>()
                     .Ret<In>().Ret<In>().Ret<In>().Attr<double>("z_loss"));
OP(swiglu_product, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Ret<In>().Ret<In>());
OP(swiglu_product_backward, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Ret<In>().Ret<In>());
OP(gelu_product, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Ret<In>().Ret<In>());
OP(gelu_product_backward, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Ret<In>().Ret<In>().Ret<In>());
OP(adamw, ffi::Ffi::Bind().Ctx<Stream>().Arg<In>().Arg<In>().Arg<In>().Arg<In>().RemainingArgs().RemainingRets()
              .Attr<double>("beta1").Attr<double>("beta2").Attr<double>("eps").Attr<double>("weight_decay"));
// clang-format on

}  // namespace mtlm
