// The types that operands of the matrix products may have on a GPU.
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

// The largest power of two that is not above s; 0 for 0.
FM_INLINE float power_below(float s) {
  uint32_t bits;
  memcpy(&bits, &s, 4);
  bits &= 0x7f800000u;
  memcpy(&s, &bits, 4);
  return s;
}

// What a row of operands is multiplied by: power factor = scale, and power alone before it is rounded.
template <typename O>
FM_INLINE float split_scale(float scale, float& factor) {
  const float power = rounds<O>() ? power_below(scale) : 1.0f;
  factor = power == 0.0f ? 0.0f : scale / power;
  return power;
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
