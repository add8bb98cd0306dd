// The ops on a GPU, with the signatures of csrc/ops.cpp, and what their host code shares.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fastmargin::cuda {

using at::Tensor;
using std::optional;

#ifndef FASTMARGIN_CHUNK_BYTES
#define FASTMARGIN_CHUNK_BYTES (32 << 20)
#endif
constexpr int64_t kChunkBytes =
    FASTMARGIN_CHUNK_BYTES;  // largest size of a chunk's products, and of its operands: about an L2 cache

inline void check(int error) { TORCH_CHECK(error == 0, "CUDA error ", error, " at the launch of a fastmargin kernel"); }

Tensor target_logit(const Tensor& x, const Tensor& w, const Tensor& y, const optional<Tensor>& bias,
                    const optional<Tensor>& class_ids, bool normalize_weight);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nontarget_lse_fwd(
    const Tensor& x, const Tensor& w, const Tensor& y, const optional<Tensor>& bias, const optional<Tensor>& class_ids,
    const optional<Tensor>& bend, bool normalize_weight, int64_t pool, int64_t topk,
    optional<at::ScalarType> compute_dtype, bool need_expected_weight, const optional<Tensor>& operands,
    const optional<Tensor>& scales, bool keep_exponentials);

std::tuple<Tensor, Tensor, Tensor> nontarget_lse_bwd(const Tensor& x, const Tensor& w, const Tensor& y,
                                                     const optional<Tensor>& bias, const optional<Tensor>& class_ids,
                                                     const optional<Tensor>& bend, bool normalize_weight, int64_t pool,
                                                     optional<at::ScalarType> compute_dtype, const Tensor& rest,
                                                     const Tensor& topk_classes, const Tensor& expected_weight,
                                                     const Tensor& exponentials, const Tensor& d_rest,
                                                     const Tensor& d_target, const optional<Tensor>& d_topk,
                                                     bool need_dx, bool need_dw, bool need_db);

std::tuple<Tensor, Tensor> nontarget_lse_bwd_update(
    const Tensor& x, const Tensor& w, const Tensor& y, const optional<Tensor>& bias, const optional<Tensor>& class_ids,
    const optional<Tensor>& bend, bool normalize_weight, int64_t pool, optional<at::ScalarType> compute_dtype,
    const Tensor& rest, const Tensor& topk_classes, const Tensor& expected_weight, const Tensor& exponentials,
    const Tensor& d_rest, const Tensor& d_target, const optional<Tensor>& d_topk, bool need_dx, bool need_db,
    at::TensorList state, std::string_view rule, at::ArrayRef<double> hyper, const optional<Tensor>& grad_scale,
    const optional<Tensor>& operands, const optional<Tensor>& scales);

void class_update(const Tensor& w, at::TensorList state, const Tensor& grad, const optional<Tensor>& class_ids,
                  std::string_view rule, at::ArrayRef<double> hyper, const optional<Tensor>& grad_scale);

void class_lazy_update(const Tensor& w, const optional<Tensor>& v, const optional<Tensor>& class_ids,
                       const Tensor& products);

void class_operands(const Tensor& w, bool normalize_weight, const Tensor& operands, const Tensor& scales);

std::tuple<Tensor, Tensor> pairwise_potential_fwd(const Tensor& a, const optional<Tensor>& b, const Tensor& a_ids,
                                                  const optional<Tensor>& b_ids, const optional<Tensor>& b_weight,
                                                  c10::string_view kind, double margin, bool want_slope);

}  // namespace fastmargin::cuda
