// CUDA streams and matrix products for the host code, and the registration of its ops.
#include "device.h"

#include <ATen/ops/baddbmm.h>
#include <ATen/ops/mm.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops.h"

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

NoTf32::NoTf32() {
  at::Context& torch = at::globalContext();
  TORCH_CHECK_VALUE(
      torch.blasPreferredBackend() != at::BlasBackend::Cublaslt ||
          torch.float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) != at::Float32Precision::TF32,
      "squared distances need float32 products, and cuBLASLt would round them to TF32: want "
      "torch.backends.cuda.preferred_blas_library('cublas'), or TF32 off for matrix products");
}

}  // namespace fastmargin::device

TORCH_LIBRARY_IMPL(fastmargin, CUDA, m) {
  m.impl("target_logit", fastmargin::cuda::target_logit);
  m.impl("nontarget_lse_fwd", fastmargin::cuda::nontarget_lse_fwd);
  m.impl("nontarget_lse_bwd", fastmargin::cuda::nontarget_lse_bwd);
  m.impl("nontarget_lse_bwd_update", fastmargin::cuda::nontarget_lse_bwd_update);
  m.impl("class_update", fastmargin::cuda::class_update);
  m.impl("class_operands", fastmargin::cuda::class_operands);
  m.impl("class_lazy_update", fastmargin::cuda::class_lazy_update);
  m.impl("pairwise_potential_fwd", fastmargin::cuda::pairwise_potential_fwd);
}
