// What the host code needs from the device beside the kernels. device.cpp implements it with CUDA; tests/cuda_on_cpu,
// on the CPU.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

namespace fastmargin::device {

void* stream_of(const at::Tensor& t);  // the current stream of t's device

// out = a b, with float32 sums whatever the operands' type
void multiply(const at::Tensor& out /* [m, n] */, const at::Tensor& a /* [m, k] */, const at::Tensor& b /* [k, n] */);

// out += a b, batched over s
void multiply_add(const at::Tensor& out /* [s, m, n] */, const at::Tensor& a /* [s, m, k] */,
                  const at::Tensor& b /* [s, k, n] */);

// While an object lives, this thread's products of float32 operands are not rounded to TF32, whatever torch is set to.
// cuBLASLt ignores torch's guard: where the user chose it, and allowed TF32, the constructor raises.
struct NoTf32 {
  at::NoTF32Guard guard;
  NoTf32();
};

}  // namespace fastmargin::device
