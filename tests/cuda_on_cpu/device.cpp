// The CPU in place of a GPU, for the tests: host code and kernels run unchanged, on CPU tensors. Products are computed
// in float64; where torch allows TF32 and no guard forbids it, float32 operands are first rounded to it, as on a GPU.
#include "../../csrc/cuda/device.h"

#include <ATen/ops/bitwise_and.h>
#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include <utility>
#include <vector>

#include "../../csrc/cuda/ops.h"
#include "cuda_runtime.h"

namespace fastmargin::device {

void* stream_of(const at::Tensor&) { return nullptr; }

namespace {

bool allows_tf32() {
  return !at::NoTF32Guard::should_disable_tf32() &&
         at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
             at::Float32Precision::TF32;
}

at::Tensor operand(const at::Tensor& t) {
  if (t.scalar_type() != at::kFloat || !allows_tf32()) return t.to(at::kDouble);
  return at::bitwise_and(t.contiguous().view(at::kInt), ~((1 << 13) - 1)).view(at::kFloat).to(at::kDouble);
}

}  // namespace

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  ++emulated::products;
  out.copy_(at::matmul(operand(a), operand(b)));
}

void multiply_add(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  ++emulated::products;
  out.add_(at::matmul(operand(a), operand(b)));
}

NoTf32::NoTf32() {}

}  // namespace fastmargin::device

TORCH_LIBRARY(fastmargin_emulated, m) {
  m.def("target_logit(Tensor x, Tensor w, Tensor y, Tensor? bias, Tensor? class_ids, bool normalize_weight) -> Tensor",
        fastmargin::cuda::target_logit);
  m.def(
      "nontarget_lse_fwd(Tensor x, Tensor w, Tensor y, Tensor? bias, Tensor? class_ids, Tensor? bend, bool "
      "normalize_weight, int pool, int topk, ScalarType? compute_dtype, bool need_expected_weight, Tensor? "
      "operands=None, Tensor? scales=None, bool keep_exponentials=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      fastmargin::cuda::nontarget_lse_fwd);
  m.def(
      "nontarget_lse_bwd(Tensor x, Tensor w, Tensor y, Tensor? bias, Tensor? class_ids, Tensor? bend, bool "
      "normalize_weight, int pool, ScalarType? compute_dtype, Tensor rest, Tensor topk_classes, Tensor "
      "expected_weight, Tensor exponentials, Tensor d_rest, Tensor d_target, Tensor? d_topk, bool need_dx, bool "
      "need_dw, bool need_db) -> (Tensor, Tensor, Tensor)",
      fastmargin::cuda::nontarget_lse_bwd);
  m.def(
      "nontarget_lse_bwd_update(Tensor x, Tensor(a!) w, Tensor y, Tensor? bias, Tensor? class_ids, Tensor? bend, bool "
      "normalize_weight, int pool, ScalarType? compute_dtype, Tensor rest, Tensor topk_classes, Tensor "
      "expected_weight, Tensor exponentials, Tensor d_rest, Tensor d_target, Tensor? d_topk, bool need_dx, bool "
      "need_db, Tensor(b!)[] state, str rule, float[] hyper, Tensor? grad_scale, Tensor(c!)? operands=None, "
      "Tensor(d!)? "
      "scales=None) -> (Tensor dx, Tensor db)",
      fastmargin::cuda::nontarget_lse_bwd_update);
  m.def(
      "class_update(Tensor(a!) w, Tensor(b!)[] state, Tensor grad, Tensor? class_ids, str rule, float[] hyper, Tensor? "
      "grad_scale) -> ()",
      fastmargin::cuda::class_update);
  m.def("class_operands(Tensor w, bool normalize_weight, Tensor(a!) operands, Tensor(b!) scales) -> ()",
        fastmargin::cuda::class_operands);
  m.def("class_lazy_update(Tensor(a!) w, Tensor(b!)? v, Tensor? class_ids, Tensor products) -> ()",
        fastmargin::cuda::class_lazy_update);
  m.def("pairwise_potential_fwd", fastmargin::cuda::pairwise_potential_fwd);
  m.def("launches", [] {  // of kernels and products since the last call
    return std::vector<int64_t>{std::exchange(emulated::kernels, 0), std::exchange(emulated::products, 0)};
  });
}
