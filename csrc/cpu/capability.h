// What this machine's CPU can run.
#pragma once

#include <string>

namespace fastmargin {

std::string cpu_kernels();     // the capability whose kernel objects run here
bool cpu_computes_bfloat16();  // whether products of bfloat16 operands with float32 sums run here

}  // namespace fastmargin
