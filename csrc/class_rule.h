// The rule of an optimizer step, from op arguments that are checked here.
//
//   sgd      hyper lr, momentum, weight_decay, nesterov (0 or 1);  state v, or none without momentum
//   adamw    hyper lr, weight_decay, beta1, beta2, eps, 1 - beta1^t, sqrt(1 - beta2^t);  state m, s
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <string_view>

#include "optimizer_step.h"

namespace fastmargin {

struct Rule {
  bool is_sgd;
  Sgd sgd;
  AdamW adamw;
};

inline Rule rule_of(std::string_view name, at::ArrayRef<double> hyper, const at::Tensor& w /* [C, d] */,
                    at::TensorList state /* [C, d] each */) {
  const bool is_sgd = name == "sgd";
  TORCH_CHECK_VALUE(is_sgd || name == "adamw", "rule = ", name, ": want sgd or adamw");
  TORCH_CHECK_VALUE(is_sgd ? hyper.size() == 4 && state.size() < 2 : hyper.size() == 7 && state.size() == 2, name,
                    " wants ", is_sgd ? "4 hyper-parameters, and at most 1" : "7 hyper-parameters, and 2",
                    " states; got ", hyper.size(), " and ", state.size());
  const auto like_w = [&](const at::Tensor& t) {
    return t.is_contiguous() && t.sizes() == w.sizes() && t.scalar_type() == w.scalar_type() &&
           t.device() == w.device();
  };
  TORCH_CHECK_VALUE(like_w(w) && std::all_of(state.begin(), state.end(), like_w),
                    "want a weight and optimizer states of one shape, dtype and device, contiguous");
  if (is_sgd) return {true, {hyper[0], hyper[1], hyper[2], hyper[3] != 0}, {}};
  return {false, {}, {hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], hyper[6]}};
}

}  // namespace fastmargin
