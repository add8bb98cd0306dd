// class_update, class_lazy_update and class_operands on a GPU: checks and launches. Formulas:
// fastmargin/ops/class_update.py, fastmargin/ops/operand_cache.py.
#include <c10/core/DeviceGuard.h>

#include <vector>

#include "class_step.h"
#include "device.h"

namespace fastmargin::cuda {
namespace {

void check_float(const Tensor& w) {
  TORCH_CHECK_VALUE(w.scalar_type() == at::kFloat, "want float32 on a GPU; got ", w.scalar_type());
}

optional<Tensor> checked_ids(const optional<Tensor>& class_ids, const Tensor& w) {
  return class_ids ? optional(checked_like("class_ids", *class_ids, {class_ids->numel()}, at::kLong, w.device()))
                   : std::nullopt;
}

}  // namespace

void class_update(const Tensor& w,                    // [C, d], changed
                  at::TensorList state,               // [C, d] each, changed
                  const Tensor& grad,                 // [n, d]
                  const optional<Tensor>& class_ids,  // [n]
                  std::string_view rule, at::ArrayRef<double> hyper, const optional<Tensor>& grad_scale /* [] */) {
  check_float(w);
  const auto ids = checked_ids(class_ids, w);
  const ClassStep step(w, state, ids, rule, hyper, grad_scale, {}, device::stream_of(w));
  const int64_t n = ids ? ids->size(0) : w.size(0);
  const Tensor g = checked_like("grad", grad, {n, w.size(1)}, at::kFloat, w.device());
  const c10::DeviceGuard guard(w.device());
  step.make(g.const_data_ptr<float>(), 0, n);
}

void class_lazy_update(const Tensor& w,                    // [C, d], changed
                       const optional<Tensor>& v,          // [C, d], changed
                       const optional<Tensor>& class_ids,  // [n]
                       const Tensor& products /* [n, 4] */) {
  check_float(w);
  const auto ids = checked_ids(class_ids, w);
  std::vector<Tensor> state;
  if (v) state.push_back(*v);
  const ClassStep step(w, state, ids, "sgd", std::vector<double>(4), {}, {}, device::stream_of(w));
  const int64_t n = ids ? ids->size(0) : w.size(0);
  const Tensor p = checked_like("products", products, {n, 4}, at::kFloat, w.device());
  const c10::DeviceGuard guard(w.device());
  check(launch_class_lazy_update(step.states, p.const_data_ptr<float>(), n, step.stream));
}

void class_operands(const Tensor& w,  // [C, d]
                    bool normalize_weight,
                    const Tensor& operands,  // [C, d] changed
                    const Tensor& scales /* [2, C] changed: exponent_scale, residual_scale */) {
  TORCH_CHECK_VALUE(w.dim() == 2, "want w [C, d]; got ", w.sizes());
  check_float(w);
  const OperandCache cache = operand_cache_of(w, normalize_weight, operands.scalar_type(), operands, scales);
  const int64_t C = w.size(0), d = w.size(1);
  const Classes all{
      w.const_data_ptr<float>(), w.stride(0), w.stride(1), nullptr, nullptr, nullptr, C, d, normalize_weight, 0, C};
  const c10::DeviceGuard guard(w.device());
  check(launch_operands(cache.type, all, cache.o, cache.exponent_scale, cache.residual_scale, device::stream_of(w)));
}

}  // namespace fastmargin::cuda
