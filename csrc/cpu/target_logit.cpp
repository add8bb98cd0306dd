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
Tensor dots(const Operands& o) {
  const auto& kernels = nontarget_lse_kernels<T>();
  const ClassRows<T> classes(o.w, o.class_ids);
  const T* bias = o.bias ? o.bias->const_data_ptr<T>() : nullptr;
  const int64_t d = classes.d;
  Tensor target = at::empty({o.x.size(0)}, o.x.options());
  at::parallel_for(0, o.x.size(0), 64, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(d);
    for (int64_t i = begin; i < end; ++i) {
      T& out = target.data_ptr<T>()[i] = 0;
      const int64_t label = o.y.const_data_ptr<int64_t>()[i];
      if (label < 0) continue;
      const T* row = classes.row(label, buffer.data());
      T scale = 1;
      if (o.normalize_weight) kernels.inverse_norms(row, d, 1, d, &scale);
      out = kernels.dot(o.x.const_data_ptr<T>() + i * d, row, d) * scale + (bias ? bias[classes.id(label)] : T(0));
    }
  });
  return target;
}

Tensor target_logit(const Tensor& x,                    // [B, d]
                    const Tensor& w,                    // [C, d]
                    const Tensor& y,                    // [B]
                    const optional<Tensor>& bias,       // [C]
                    const optional<Tensor>& class_ids,  // [n]
                    bool normalize_weight) {
  const Operands o = checked_values(x, w, y, bias, class_ids, normalize_weight);
  return dispatch(x.scalar_type(), [&](auto t) { return dots<decltype(t)>(o); });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) { m.impl("target_logit", target_logit); }

}  // namespace fastmargin
