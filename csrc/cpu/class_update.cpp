// Optimizer steps of class weights on the CPU. The rules are in csrc/optimizer_step.h, their contract in
// fastmargin/ops/class_update.py.
#include "class_update.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "../check.h"

namespace fastmargin {
namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kGrain = 64;  // classes

// The number of classes that change, and their ids if not all do.
struct Selection {
  int64_t n;
  optional<Tensor> ids;  // [n] contiguous
};

Selection checked_selection(const Tensor& w, const optional<Tensor>& class_ids) {
  TORCH_CHECK_VALUE(w.dim() == 2 && (w.scalar_type() == at::kFloat || w.scalar_type() == at::kDouble),
                    "want a weight [C, d] of float32 or float64; got ", w.sizes(), " ", w.scalar_type());
  if (!class_ids) return {w.size(0), std::nullopt};
  const Tensor ids = checked_like("class_ids", *class_ids, {class_ids->numel()}, at::kLong);
  check_class_ids(ids, w.size(0));
  return {ids.size(0), ids};
}

void class_update(const Tensor& w,                    // [C, d], changed
                  at::TensorList state,               // [C, d] each, changed
                  const Tensor& grad,                 // [n, d]
                  const optional<Tensor>& class_ids,  // [n]
                  c10::string_view rule, at::ArrayRef<double> hyper, const optional<Tensor>& grad_scale /* [] */) {
  const Selection which = checked_selection(w, class_ids);
  const int64_t d = w.size(1);
  const Tensor g = checked_like("grad", grad, {which.n, d}, w.scalar_type());
  dispatch(w.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const ClassUpdate<T> update(w, state, which.ids, rule, hyper, grad_scale);
    at::parallel_for(0, which.n, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) update.step(j, g.const_data_ptr<T>() + j * d);
    });
  });
}

// (v, w) := p (v, w): the steps of SGD that a class has missed while it had no gradient, as one 2 x 2 matrix.
void class_lazy_update(const Tensor& w,                    // [C, d], changed
                       const optional<Tensor>& v,          // [C, d], changed
                       const optional<Tensor>& class_ids,  // [n]
                       const Tensor& products /* [n, 4] */) {
  const Selection which = checked_selection(w, class_ids);
  const int64_t d = w.size(1);
  const Tensor p = checked_like("products", products, {which.n, 4}, w.scalar_type());
  TORCH_CHECK_VALUE(w.is_contiguous(), "want a contiguous weight");
  if (v) TORCH_CHECK_VALUE(checked_like("v", *v, w.sizes(), w.scalar_type()).is_same(*v), "want a contiguous momentum");
  const int64_t* id = which.ids ? which.ids->const_data_ptr<int64_t>() : nullptr;
  dispatch(w.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto& kernels = class_update_kernels<T>();
    at::parallel_for(0, which.n, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const int64_t at = (id ? id[j] : j) * d;
        const ClassRow<T> row{w.data_ptr<T>() + at, v ? v->data_ptr<T>() + at : nullptr, nullptr};
        kernels.transform(row, p.const_data_ptr<T>() + 4 * j, d);
      }
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) {
  m.impl("class_update", class_update);
  m.impl("class_lazy_update", class_lazy_update);
}

}  // namespace fastmargin
