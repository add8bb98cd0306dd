// The CPU in the place of a GPU, for the tests: glue.cpp and the kernels run as they are, on CPU tensors.
#include "../../csrc/cuda/device.h"

#include <ATen/ops/matmul.h>
#include <torch/library.h>

#include "../../csrc/cuda/glue.h"

namespace fastmargin::device {

void* stream_of(const at::Tensor&) { return nullptr; }

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  out.copy_(at::matmul(a.to(at::kDouble), b.to(at::kDouble)));
}

void multiply_add(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  out.add_(at::matmul(a.to(at::kDouble), b.to(at::kDouble)));
}

}  // namespace fastmargin::device

TORCH_LIBRARY(fastmargin_emulated, m) {
  m.def("target_logit(Tensor x, Tensor w, Tensor y, Tensor? bias, Tensor? rows, bool normalize_weight) -> Tensor",
        fastmargin::cuda::target_logit);
  m.def("nontarget_lse_fwd", fastmargin::cuda::nontarget_lse_fwd);
  m.def("nontarget_lse_bwd", fastmargin::cuda::nontarget_lse_bwd);
}
