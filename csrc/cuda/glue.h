// The ops of a GPU, with the signatures of csrc/ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fastmargin::cuda {

using at::Tensor;
using std::optional;

Tensor target_logit(const Tensor& x, const Tensor& w, const Tensor& y, const optional<Tensor>& bias,
                    const optional<Tensor>& rows, bool normalize_weight);

std::tuple<Tensor, Tensor, Tensor, Tensor> nontarget_lse_fwd(const Tensor& x, const Tensor& w, const Tensor& y,
                                                             const optional<Tensor>& bias, const optional<Tensor>& rows,
                                                             const optional<Tensor>& bend, bool normalize_weight,
                                                             int64_t pool, int64_t topk,
                                                             optional<at::ScalarType> compute_dtype, bool want_a);

std::tuple<Tensor, Tensor, Tensor> nontarget_lse_bwd(const Tensor& x, const Tensor& w, const Tensor& y,
                                                     const optional<Tensor>& bias, const optional<Tensor>& rows,
                                                     const optional<Tensor>& bend, bool normalize_weight, int64_t pool,
                                                     optional<at::ScalarType> compute_dtype, const Tensor& rest,
                                                     const Tensor& topk_classes, const Tensor& a, const Tensor& d_rest,
                                                     const Tensor& d_target, const optional<Tensor>& d_topk,
                                                     bool need_dx, bool need_dw, bool need_db);

std::tuple<Tensor, Tensor> nontarget_lse_bwd_update(
    const Tensor& x, const Tensor& w, const Tensor& y, const optional<Tensor>& bias, const optional<Tensor>& rows,
    const optional<Tensor>& bend, bool normalize_weight, int64_t pool, optional<at::ScalarType> compute_dtype,
    const Tensor& rest, const Tensor& topk_classes, const Tensor& a, const Tensor& d_rest, const Tensor& d_target,
    const optional<Tensor>& d_topk, bool need_dx, bool need_db, at::TensorList state, std::string_view rule,
    at::ArrayRef<double> hyper, const optional<Tensor>& grad_scale);

void class_update(const Tensor& w, at::TensorList state, const Tensor& grad, const optional<Tensor>& rows,
                  std::string_view rule, at::ArrayRef<double> hyper, const optional<Tensor>& grad_scale);

void class_catch_up(const Tensor& w, const optional<Tensor>& v, const optional<Tensor>& rows, const Tensor& products);

}  // namespace fastmargin::cuda
