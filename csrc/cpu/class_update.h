// An optimiser step of class weights in place: which rule, on which rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../check.h"
#include "class_update_kernel.h"

namespace fastmargin {

template <typename T>
class ClassUpdate {
 public:
  // hyper: sgd    lr, momentum, weight_decay, nesterov (0 or 1);                       state: [v], or none without
  // momentum
  //        adamw  lr, weight_decay, beta1, beta2, eps, 1 - beta1^t, sqrt(1 - beta2^t);  state: [m, s]
  // grad_scale: gradients are divided by it, and rows whose gradient is not finite are left as they are.
  ClassUpdate(const at::Tensor& w /* [C, d] */, at::TensorList state /* [C, d] each */,
              const std::optional<at::Tensor>& rows /* [n] */, std::string_view rule, at::ArrayRef<double> hyper,
              const std::optional<at::Tensor>& grad_scale /* [] */)
      : w_(data(w, w)),
        first_(state.size() > 0 ? data(state[0], w) : nullptr),
        second_(state.size() > 1 ? data(state[1], w) : nullptr),
        rows_(rows ? rows->const_data_ptr<int64_t>() : nullptr),
        d_(w.size(1)),
        is_sgd_(rule == "sgd"),
        factor_(grad_scale ? T(1 / grad_scale->item<double>()) : T(1)),
        finite_(grad_scale) {
    TORCH_CHECK_VALUE(is_sgd_ || rule == "adamw", "rule = ", rule, ": want sgd or adamw");
    TORCH_CHECK_VALUE(is_sgd_ ? hyper.size() == 4 && state.size() < 2 : hyper.size() == 7 && state.size() == 2, rule,
                      " wants ", is_sgd_ ? "4 hyper-parameters, and at most 1" : "7 hyper-parameters, and 2",
                      " states; got ", hyper.size(), " and ", state.size());
    if (is_sgd_) {
      sgd_ = {hyper[0], hyper[1], hyper[2], hyper[3] != 0};
    } else {
      adamw_ = {hyper[0], hyper[1], hyper[2], hyper[3], hyper[4], hyper[5], hyper[6]};
    }
  }

  // The class at this place with its gradient.
  void step(int64_t place, const T* g /* [d] */) const {
    if (is_sgd_) {
      kernels_.sgd(sgd_, row(place), g, factor_, finite_, d_);
    } else {
      kernels_.adamw(adamw_, row(place), g, factor_, finite_, d_);
    }
  }

 private:
  static T* data(const at::Tensor& t, const at::Tensor& w) {
    TORCH_CHECK_VALUE(
        t.is_contiguous() && t.sizes() == w.sizes() && t.scalar_type() == c10::CppTypeToScalarType<T>::value,
        "want a weight and states of one shape and dtype, contiguous; got ", w.sizes(), " ", w.scalar_type(), " and ",
        t.sizes(), " ", t.scalar_type());
    return t.data_ptr<T>();
  }

  ClassRow<T> row(int64_t place) const {
    const int64_t at = (rows_ ? rows_[place] : place) * d_;
    return {w_ + at, first_ ? first_ + at : nullptr, second_ ? second_ + at : nullptr};
  }

  T *w_, *first_, *second_;
  const int64_t* rows_;
  int64_t d_;
  bool is_sgd_;
  Sgd sgd_{};
  AdamW adamw_{};
  T factor_;
  bool finite_;
  const ClassUpdateKernels<T>& kernels_ = class_update_kernels<T>();
};

}  // namespace fastmargin
