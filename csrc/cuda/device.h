// What the host code needs of the device beside the kernels; device.cpp does it with CUDA.
#pragma once

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>

namespace fastmargin::device {

void* stream_of(const at::Tensor& t);  // the current stream of its device

// out = a b, with float32 sums whatever the operands' type
void multiply(const at::Tensor& out /* [m, n] */, const at::Tensor& a /* [m, k] */, const at::Tensor& b /* [k, n] */);

// out += a b of every split
void multiply_add(const at::Tensor& out /* [s, m, n] */, const at::Tensor& a /* [s, m, k] */,
                  const at::Tensor& b /* [s, k, n] */);

// While it lives, this thread's products of float32 operands are not rounded to TF32, whatever torch is set to.
// cuBLASLt does not look at torch's guard: where the user chose it, and TF32 as well, this raises.
struct NoTf32 {
  at::NoTF32Guard guard;
  NoTf32();
};

}  // namespace fastmargin::device
