// The operand types of the matrix products on a GPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "../tile.h"
#include "launch.h"

namespace fastmargin {

enum class Half : uint16_t {};  // a float16 number, as bits

FM_INLINE Half rounded(float x, Half) {
#ifdef __CUDACC__
  return Half(__half_as_ushort(__float2half_rn(x)));
#else
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return Half(bits);
#endif
}

template <typename O>
FM_INLINE constexpr bool rounds() {
  return sizeof(O) < sizeof(float);
}

// The largest power of two <= s; 0 for 0.
FM_INLINE float power_of_two_below(float s) {
  uint32_t bits;
  memcpy(&bits, &s, 4);
  bits &= 0x7f800000u;
  memcpy(&s, &bits, 4);
  return s;
}

// Splits scale = exponent_scale * residual_scale: a power of two, which is applied to the weights before they are
// rounded, and a number in [1, 2), which is applied to the products. Returns the power of two.
template <typename O>
FM_INLINE float split_scale(float scale, float& residual_scale) {
  const float exponent_scale = rounds<O>() ? power_of_two_below(scale) : 1.0f;
  residual_scale = exponent_scale == 0.0f ? 0.0f : scale / exponent_scale;
  return exponent_scale;
}

// Calls f with a value of the operand type.
template <typename F>
int with_operand(OperandType type, const F& f) {
  switch (type) {
    case OperandType::kBf16:
      return f(Bf16());
    case OperandType::kHalf:
      return f(Half());
    default:
      return f(float());
  }
}

}  // namespace fastmargin
