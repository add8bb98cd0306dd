// An optimizer step of class weights, in place.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../class_rule.h"
#include "class_update_kernel.h"

namespace fastmargin {

template <typename T>
class ClassUpdate {
 public:
  // grad_scale: gradients are divided by it, and rows whose gradient is not finite are left as they are.
  ClassUpdate(const at::Tensor& w /* [C, d] */, at::TensorList state /* [C, d] each */,
              const std::optional<at::Tensor>& class_ids /* [n] */, std::string_view rule, at::ArrayRef<double> hyper,
              const std::optional<at::Tensor>& grad_scale /* [] */)
      : rule_(rule_of(rule, hyper, w, state)),
        w_(w.data_ptr<T>()),
        first_(state.size() > 0 ? state[0].data_ptr<T>() : nullptr),
        second_(state.size() > 1 ? state[1].data_ptr<T>() : nullptr),
        class_ids_(class_ids ? class_ids->const_data_ptr<int64_t>() : nullptr),
        d_(w.size(1)),
        inverse_grad_scale_(grad_scale ? T(1 / grad_scale->item<double>()) : T(1)),
        skip_not_finite_(grad_scale) {}

  // Steps one class, by its index: in class_ids where given, else in w.
  void step(int64_t index, const T* g /* [d] */) const {
    if (rule_.is_sgd) {
      kernels_.sgd(rule_.sgd, row(index), g, inverse_grad_scale_, skip_not_finite_, d_);
    } else {
      kernels_.adamw(rule_.adamw, row(index), g, inverse_grad_scale_, skip_not_finite_, d_);
    }
  }

 private:
  ClassRow<T> row(int64_t index) const {
    const int64_t at = (class_ids_ ? class_ids_[index] : index) * d_;
    return {w_ + at, first_ ? first_ + at : nullptr, second_ ? second_ + at : nullptr};
  }

  Rule rule_;
  T *w_, *first_, *second_;
  const int64_t* class_ids_;
  int64_t d_;
  T inverse_grad_scale_;
  bool skip_not_finite_;
  const ClassUpdateKernels<T>& kernels_ = class_update_kernels<T>();
};

}  // namespace fastmargin
