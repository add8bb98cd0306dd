// An optimizer step of class weights on a GPU, and the operand cache that it keeps up to date: host code shared by
// class_update and nontarget_lse_bwd_update.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "../check.h"
#include "../class_rule.h"
#include "launch.h"
#include "ops.h"

namespace fastmargin::cuda {

inline OperandType operand_type(at::ScalarType t) {
  return t == at::kBFloat16 ? OperandType::kBf16 : t == at::kHalf ? OperandType::kHalf : OperandType::kFloat;
}

// The operand cache of the weights w [C, d], checked; empty without operands.
inline OperandCache operand_cache_of(const Tensor& w, bool normalize, at::ScalarType type,
                                     const optional<Tensor>& operands /* [C, d] */,
                                     const optional<Tensor>& scales /* [2, C] exponent_scale, residual_scale */) {
  TORCH_CHECK_VALUE(operands.has_value() == scales.has_value(), "want operands with their scales, or neither");
  if (!operands) return {OperandType::kFloat, nullptr, nullptr, nullptr, normalize};
  TORCH_CHECK_VALUE(type == at::kBFloat16 || type == at::kHalf, "want operands of bfloat16 or float16; got ", type);
  const int64_t C = w.size(0);
  const bool contiguous = checked_like("operands", *operands, w.sizes(), type, w.device()).is_same(*operands) &&
                          checked_like("scales", *scales, {2, C}, at::kFloat, w.device()).is_same(*scales);
  TORCH_CHECK_VALUE(contiguous, "want contiguous operands and scales");
  float* exponent_scale = scales->data_ptr<float>();
  return {operand_type(type), operands->data_ptr(), exponent_scale, exponent_scale + C, normalize};
}

struct ClassStep {
  Rule rule;
  ClassStates states;
  OperandCache cache;
  void* stream;

  ClassStep(const Tensor& w /* [C, d] */, at::TensorList state /* [C, d] each */,
            const optional<Tensor>& class_ids /* [n] */, std::string_view name, at::ArrayRef<double> hyper,
            const optional<Tensor>& grad_scale /* [] */, const OperandCache& operand_cache, void* on)
      : rule(rule_of(name, hyper, w, state)), cache(operand_cache), stream(on) {
    const auto data = [&](size_t i) { return state.size() > i ? state[i].data_ptr<float>() : nullptr; };
    states = {w.data_ptr<float>(),
              data(0),
              data(1),
              class_ids ? class_ids->const_data_ptr<int64_t>() : nullptr,
              grad_scale ? grad_scale->const_data_ptr<float>() : nullptr,
              w.size(1)};
  }

  // Steps n classes from class index `first`.
  void make(const float* g /* [n, d] */, int64_t first, int64_t n) const {
    check(rule.is_sgd ? launch_class_update(rule.sgd, states, cache, g, first, n, stream)
                      : launch_class_update(rule.adamw, states, cache, g, first, n, stream));
  }
};

}  // namespace fastmargin::cuda
