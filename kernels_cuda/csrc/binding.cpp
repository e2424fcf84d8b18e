// The CUDA implementations of the ops that kernels_cuda/library.py declares, over LibTorch's stable ABI: one file
// for every PyTorch from 2.10 on. Here inputs and outputs are checked; the kernels know no torch. Nothing is allocated:
// the stable ABI passes no error's type on, and training must be able to tell that memory ran out (allocate.py).
#include "binding.h"

#include <cmath>
#include <optional>
#include <vector>

namespace mtlm::op {
namespace {

// What the norm's input and output types can be: alike, or a float32 residual beside bfloat16.
void check_types(Type type, Type residual, const char* op) {
  STD_TORCH_CHECK(type == residual || residual == Type::float32, "mtlm::", op,
                  ": a bfloat16 residual beside a float32 branch or output is not supported");
}

void check_matrix(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must be [rows, d], not ", shape(x));
  STD_TORCH_CHECK(x.size(0) <= MOST_BLOCKS, name, " has ", x.size(0), " rows; at most ", MOST_BLOCKS);
}

void rms_norm_into(Tensor x, Tensor weight, double eps, Tensor normed, Tensor rstd) {
  check_matrix(x, "x");
  const int64_t rows = x.size(0), d = x.size(1);
  check(weight, "weight", x, {d});
  check_out(normed, "normed", x, {rows, d});
  check_out(rstd, "rstd", x, {rows}, ScalarType::Float);
  check_types(type_of(normed, "dtype"), type_of(x, "x"), "rms_norm");
  check_whole_rows(weight, "weight");
  const Place place(x);
  const RMSNormForward args = {{nullptr, 0},
                               rows_of(x, "x"),
                               weight.const_data_ptr(),
                               static_cast<float>(eps),
                               normed.mutable_data_ptr(),
                               nullptr,
                               static_cast<float*>(rstd.mutable_data_ptr())};
  check_launch(rms_norm_forward(args, rows, d, type_of(normed, "dtype"), type_of(x, "x"),
                                type_of(weight, "weight"), place.stream),
               "rms_norm");
}

void add_rms_norm_into(Tensor residual, Tensor branch, Tensor weight, double eps, Tensor normed, Tensor sum,
                       Tensor rstd) {
  check_matrix(residual, "residual");
  const int64_t rows = residual.size(0), d = residual.size(1);
  check(branch, "branch", residual, {rows, d});
  check(weight, "weight", residual, {d});
  const Type type = type_of(branch, "branch"), residual_type = type_of(residual, "residual");
  check_types(type, residual_type, "add_rms_norm");
  check_out(normed, "normed", residual, {rows, d}, branch.scalar_type());
  check_out(sum, "sum", residual, {rows, d}, residual.scalar_type());
  check_out(rstd, "rstd", residual, {rows}, ScalarType::Float);
  check_whole_rows(weight, "weight");
  const Place place(residual);
  const RMSNormForward args = {rows_of(branch, "branch"),
                               rows_of(residual, "residual"),
                               weight.const_data_ptr(),
                               static_cast<float>(eps),
                               normed.mutable_data_ptr(),
                               sum.mutable_data_ptr(),
                               static_cast<float*>(rstd.mutable_data_ptr())};
  check_launch(
      rms_norm_forward(args, rows, d, type, residual_type, type_of(weight, "weight"), place.stream),
      "add_rms_norm");
}

int64_t rms_norm_partials(Tensor x) {
  check_matrix(x, "x");
  const Place place(x);
  return ::mtlm::rms_norm_partials(x.size(0));
}

void rms_norm_backward_into(Tensor d_normed, std::optional<Tensor> d_sum, Tensor x, Tensor rstd, Tensor weight,
                            Tensor d_x, Tensor d_branch, Tensor d_weight, Tensor partials) {
  check_matrix(x, "x");
  const int64_t rows = x.size(0), d = x.size(1);
  check(d_normed, "d_normed", x, {rows, d});
  check_out(rstd, "rstd", x, {rows}, ScalarType::Float);
  check(weight, "weight", x, {d});
  const Type type = type_of(d_normed, "d_normed"), residual_type = type_of(x, "x");
  check_types(type, residual_type, "rms_norm_backward");
  check_whole_rows(weight, "weight");
  const Place place(x);
  Rows d_sum_rows = {nullptr, 0};
  if (d_sum.has_value()) {
    check(*d_sum, "d_sum", x, {rows, d});
    STD_TORCH_CHECK(d_sum->scalar_type() == x.scalar_type(), "d_sum must have the type of x");
    d_sum_rows = rows_of(*d_sum, "d_sum");
  }
  const bool two = d_branch.size(0) > 0;
  STD_TORCH_CHECK(!two || type != residual_type, "d_branch must be empty where its type is that of x");
  check_out(d_x, "d_x", x, {rows, d}, x.scalar_type());
  check_out(d_branch, "d_branch", x, {two ? rows : 0, d}, d_normed.scalar_type());
  check_out(d_weight, "d_weight", x, {d}, weight.scalar_type());
  check_out(partials, "partials", x, {::mtlm::rms_norm_partials(rows), d}, ScalarType::Float);
  const RMSNormBackward args = {rows_of(d_normed, "d_normed"),
                                d_sum_rows,
                                rows_of(x, "x"),
                                static_cast<const float*>(rstd.const_data_ptr()),
                                weight.const_data_ptr(),
                                d_x.mutable_data_ptr(),
                                two ? d_branch.mutable_data_ptr() : nullptr,
                                static_cast<float*>(partials.mutable_data_ptr()),
                                d_weight.mutable_data_ptr()};
  check_launch(::mtlm::rms_norm_backward(args, rows, d, type, residual_type, type_of(weight, "weight"), place.stream),
               "rms_norm_backward");
}

HeadsView heads_view(const Tensor& from, const Tensor& to) {
  return {from.const_data_ptr(), from.stride(0), from.stride(1), from.stride(2),
          to.mutable_data_ptr(), to.stride(0),   to.stride(1),   to.stride(2)};
}

// Everything but the views, and the checks that both rotary ops share.
Rotary rotary_args(const Tensor& q, const Tensor& cos, const Tensor& sin, bool conjugate) {
  STD_TORCH_CHECK(q.dim() == 4, "q must be [batch, seq, heads, head size], not ", shape(q));
  const int64_t batch = q.size(0), seq = q.size(1), heads = q.size(2), size = q.size(3);
  STD_TORCH_CHECK(size % 2 == 0, "the head size must be even, not ", size);
  STD_TORCH_CHECK(batch * seq <= MOST_BLOCKS && heads * size <= MOST_BLOCKS, "q of shape ", shape(q),
                  " has more than ", MOST_BLOCKS, " tokens or elements a token");
  const int64_t angles = cos.dim() == 3 ? cos.size(0) : 0;
  STD_TORCH_CHECK(angles == 1 || angles == batch, "cos must be [1 or ", batch, ", ", seq, ", ", size / 2, "], not ",
                  shape(cos));
  check(cos, "cos", q, {angles, seq, size / 2});
  check(sin, "sin", q, {angles, seq, size / 2});
  for (const Tensor* t : {&cos, &sin}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(),
                    "cos and sin must be float32 and contiguous");
  }
  Rotary args = {};
  args.cos = static_cast<const float*>(cos.const_data_ptr());
  args.sin = static_cast<const float*>(sin.const_data_ptr());
  args.angle_batch = angles == 1 ? 0 : seq * (size / 2);
  args.batch = batch, args.seq = seq;
  args.heads = static_cast<int>(heads), args.half = static_cast<int>(size / 2);
  args.conjugate = conjugate;
  return args;
}

void rotary_(Tensor q, Tensor k, Tensor cos, Tensor sin, bool conjugate) {
  Rotary args = rotary_args(q, cos, sin, conjugate);
  check(k, "k", q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  const Type type = type_of(q, "q");
  STD_TORCH_CHECK(type_of(k, "k") == type, "q and k must have one type");
  STD_TORCH_CHECK(q.stride(3) == 1 && k.stride(3) == 1, "the elements of a head must be neighbours; the strides are ",
                  q.stride(3), " and ", k.stride(3));
  const Place place(q);
  args.views[0] = heads_view(q, q);
  args.views[1] = heads_view(k, k);
  args.count = 2;
  check_launch(rotary(args, type, place.stream), "rotary_");
}

void rotary_pack_into(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool conjugate, Tensor packed) {
  Rotary args = rotary_args(q, cos, sin, conjugate);
  const Type type = type_of(q, "q");
  const Place place(q);
  const int64_t batch = q.size(0), seq = q.size(1), heads = q.size(2), size = q.size(3);
  check_out(packed, "packed", q, {batch, seq, 3, heads, size}, q.scalar_type());
  const Tensor* parts[3] = {&q, &k, &v};
  const char* names[3] = {"q", "k", "v"};
  const int64_t bytes = static_cast<int64_t>(packed.element_size());
  for (int i = 0; i < 3; ++i) {
    check(*parts[i], names[i], q, {batch, seq, heads, size});
    check_whole_rows(*parts[i], names[i]);
    STD_TORCH_CHECK(type_of(*parts[i], names[i]) == type, "q, k and v must have one type");
    args.views[i] = {parts[i]->const_data_ptr(),
                     parts[i]->stride(0),
                     parts[i]->stride(1),
                     parts[i]->stride(2),
                     static_cast<char*>(packed.mutable_data_ptr()) + i * heads * size * bytes,
                     packed.stride(0),
                     packed.stride(1),
                     packed.stride(3)};
  }
  args.count = 3;
  check_launch(rotary(args, type, place.stream), "rotary_pack");
}

void softmax_loss_(Tensor logits, Tensor targets, Tensor total, Tensor nll, double z_loss, bool gradients) {
  check_matrix(logits, "logits");
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  check(targets, "targets", logits, {rows});
  check(total, "total", logits, {rows});
  check(nll, "nll", logits, {rows});
  const Type type = type_of(logits, "logits");
  STD_TORCH_CHECK(vocab <= MOST_BLOCKS, "logits has ", vocab, " columns; at most ", MOST_BLOCKS);
  STD_TORCH_CHECK(vocab <= 1 || logits.stride(1) == 1, "the logits of a row must be neighbours; the stride is ",
                  logits.stride(1));
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous(),
                  "targets must be int64 and contiguous");
  for (const Tensor* t : {&total, &nll}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_contiguous(),
                    "total and nll must be float32 and contiguous");
  }
  const Place place(logits);
  const SoftmaxLoss args = {logits.mutable_data_ptr(),
                            logits.stride(0),
                            static_cast<const int64_t*>(targets.const_data_ptr()),
                            static_cast<float*>(total.mutable_data_ptr()),
                            static_cast<float*>(nll.mutable_data_ptr()),
                            static_cast<float>(z_loss),
                            gradients};
  check_launch(softmax_loss(args, rows, vocab, type, place.stream), "softmax_loss_");
}

// One of the float32 tensors that belong to a parameter.
float* state(const Tensor& t, const char* name, const Tensor& param) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == param.get_device_index(), name, " is on another device");
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.is_contiguous() && t.numel() == param.numel(), name,
                  " must be float32, contiguous and of ", param.numel(), " elements, not of ", t.numel());
  return static_cast<float*>(t.mutable_data_ptr());
}

template <typename T>
const T* scalar(const Tensor& t, const char* name, ScalarType type, const Tensor& param) {
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == param.get_device_index() && t.numel() == 1 &&
                      t.scalar_type() == type,
                  name, " must be one ", type == ScalarType::Bool ? "bool" : "float32", " on the parameters' device");
  return static_cast<const T*>(t.const_data_ptr());
}

void adamw_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
            std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> copies, Tensor lr, Tensor step, Tensor grad_scale,
            Tensor skip, double beta1, double beta2, double eps, double weight_decay) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      (copies.empty() || copies.size() == count),
                  "there are ", count, " parameters, ", grads.size(), " gradients, ", exp_avgs.size(), " and ",
                  exp_avg_sqs.size(), " moments, ", copies.size(), " copies");
  if (count == 0) return;
  const Tensor& first = params[0];
  std::vector<AdamWTensor> tensors;
  tensors.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    state(params[i], "a parameter", params[i]);
    STD_TORCH_CHECK(params[i].get_device_index() == first.get_device_index(), "parameters are on several devices");
    STD_TORCH_CHECK(grads[i].is_cuda() && grads[i].get_device_index() == first.get_device_index() &&
                        grads[i].is_contiguous() && grads[i].numel() == params[i].numel(),
                    "gradient ", i, " must be contiguous, of ", params[i].numel(), " elements, on the same device");
    void* copy = nullptr;
    if (!copies.empty()) {
      STD_TORCH_CHECK(copies[i].is_cuda() && copies[i].scalar_type() == ScalarType::BFloat16 &&
                          copies[i].is_contiguous() && copies[i].numel() == params[i].numel(),
                      "copy ", i, " must be bfloat16, contiguous and of ", params[i].numel(), " elements");
      copy = copies[i].mutable_data_ptr();
    }
    tensors.push_back({static_cast<float*>(params[i].mutable_data_ptr()), grads[i].const_data_ptr(),
                       state(exp_avgs[i], "exp_avg", params[i]), state(exp_avg_sqs[i], "exp_avg_sq", params[i]), copy,
                       params[i].numel(), type_of(grads[i], "a gradient")});
  }
  const AdamWSettings settings = {scalar<float>(lr, "lr", ScalarType::Float, first),
                                  scalar<float>(step, "step", ScalarType::Float, first),
                                  scalar<float>(grad_scale, "grad_scale", ScalarType::Float, first),
                                  scalar<bool>(skip, "skip", ScalarType::Bool, first),
                                  static_cast<float>(beta2),
                                  static_cast<float>(1 - beta1),
                                  static_cast<float>(1 - beta2),
                                  static_cast<float>(std::log(beta1)),
                                  static_cast<float>(std::log(beta2)),
                                  static_cast<float>(eps),
                                  static_cast<float>(weight_decay)};
  const Place place(first);
  check_launch(adamw(tensors.data(), static_cast<int64_t>(count), settings, place.stream), "adamw_");
}

}  // namespace
}  // namespace mtlm::op

STABLE_TORCH_LIBRARY_IMPL(mtlm, CUDA, m) {
  m.impl("rms_norm_into", TORCH_BOX(&mtlm::op::rms_norm_into));
  m.impl("add_rms_norm_into", TORCH_BOX(&mtlm::op::add_rms_norm_into));
  m.impl("rms_norm_partials", TORCH_BOX(&mtlm::op::rms_norm_partials));
  m.impl("rms_norm_backward_into", TORCH_BOX(&mtlm::op::rms_norm_backward_into));
  m.impl("rotary_", TORCH_BOX(&mtlm::op::rotary_));
  m.impl("rotary_pack_into", TORCH_BOX(&mtlm::op::rotary_pack_into));
  m.impl("softmax_loss_", TORCH_BOX(&mtlm::op::softmax_loss_));
  m.impl("adamw_", TORCH_BOX(&mtlm::op::adamw_));
}
