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

// e^x on a GPU in two instructions where expf takes eight: 2 ulp, and |x| 2^-24, relative to a result that is the
// smaller the larger |x|. Results below 2^-126 are 0. On a CPU, as the CPU's kernels.
FM_INLINE float fast_exp(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896341f));
  return result;
#else
  return exp_(x);
#endif
}

// Two operands as one word, a in its lower half; one instruction on a GPU.
FM_INLINE uint32_t pair_of(float a, float b, Bf16) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
#else
  return bf16_bits(a) >> 16 | bf16_bits(b);
#endif
}
FM_INLINE uint32_t pair_of(float a, float b, Half) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
  return pair;
#else
  return uint32_t(rounded(a, Half())) | uint32_t(rounded(b, Half())) << 16;
#endif
}

struct alignas(16) Quad {
  float v[4];
};
struct alignas(8) PairedQuad {
  uint32_t v[2];
};

// Stores four numbers as operands, with one instruction.
FM_INLINE void store_quad(float* to, const float* v) { *reinterpret_cast<Quad*>(to) = {v[0], v[1], v[2], v[3]}; }
template <typename O>
FM_INLINE void store_quad(O* to, const float* v) {
  *reinterpret_cast<PairedQuad*>(to) = {pair_of(v[0], v[1], O()), pair_of(v[2], v[3], O())};
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
