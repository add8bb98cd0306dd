// target_logit on the CPU: one dot product a row. The formula is in fastmargin/ops/target_logit.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../check.h"
#include "class_rows.h"
#include "nontarget_lse_kernel.h"

namespace fastmargin {
namespace {

using at::Tensor;
using std::optional;

template <typename T>
Tensor dots(const Tensor& x, const ClassRows<T>& classes, const Tensor& y, const T* bias, bool normalize_weight) {
  const auto& kernels = nontarget_lse_kernels<T>();
  const int64_t d = classes.d;
  Tensor target = at::empty({x.size(0)}, x.options());
  at::parallel_for(0, x.size(0), 64, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(d);
    for (int64_t i = begin; i < end; ++i) {
      T& out = target.data_ptr<T>()[i] = 0;
      const int64_t label = y.const_data_ptr<int64_t>()[i];
      if (label < 0) continue;
      const T* row = classes.row(label, buffer.data());
      T scale = 1;
      if (normalize_weight) kernels.inverse_norms(row, d, 1, d, &scale);
      out = kernels.dot(x.const_data_ptr<T>() + i * d, row, d) * scale + (bias ? bias[classes.id(label)] : T(0));
    }
  });
  return target;
}

Tensor target_logit(const Tensor& x, const Tensor& w, const Tensor& y, const optional<Tensor>& bias,
                    const optional<Tensor>& rows, bool normalize_weight) {
  check_all(x, w, y, bias, rows, normalize_weight);
  const auto rows_ = rows ? optional<Tensor>(rows->contiguous()) : std::nullopt;
  const Tensor bias_ = bias ? bias->contiguous() : Tensor();
  return dispatch(x.scalar_type(), [&](auto t) {
    using T = decltype(t);
    return dots<T>(x.contiguous(), ClassRows<T>(w, rows_), y.contiguous(), bias ? bias_.const_data_ptr<T>() : nullptr,
                   normalize_weight);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) { m.impl("target_logit", target_logit); }

}  // namespace fastmargin
