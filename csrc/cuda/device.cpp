// CUDA streams and matrix products for glue.cpp, and the registration of its ops.
#include "device.h"

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "glue.h"

namespace fastmargin::device {

void* stream_of(const at::Tensor& t) { return c10::cuda::getCurrentCUDAStream(t.device().index()).stream(); }

void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor to = out;
  if (a.scalar_type() == at::kFloat) {
    at::mm_out(to, a, b);
  } else {
    at::mm_out(to, a, b, at::kFloat);
  }
}

void multiply_add(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  at::Tensor to = out;
  if (a.scalar_type() == at::kFloat) {
    at::baddbmm_out(to, out, a, b);
  } else {
    at::baddbmm_out(to, out, a, b, at::kFloat);
  }
}

}  // namespace fastmargin::device

TORCH_LIBRARY_IMPL(fastmargin, CUDA, m) {
  m.impl("target_logit", fastmargin::cuda::target_logit);
  m.impl("nontarget_lse_fwd", fastmargin::cuda::nontarget_lse_fwd);
  m.impl("nontarget_lse_bwd", fastmargin::cuda::nontarget_lse_bwd);
  m.impl("nontarget_lse_bwd_update", fastmargin::cuda::nontarget_lse_bwd_update);
  m.impl("class_update", fastmargin::cuda::class_update);
  m.impl("class_catch_up", fastmargin::cuda::class_catch_up);
}
