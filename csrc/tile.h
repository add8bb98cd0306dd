// The arithmetic of a tile of logits; plain C++ that nvcc compiles, too.
//
//   rest = log sum_j exp(z_j)   is carried as (shift, sum):  rest = shift + log(sum)
//   g_j  = d_rest exp(z_j - rest)
//   topk = the k largest (z_j, j), larger z first, equal z by the smaller j
//
// Everything here has internal linkage: translation units are compiled for different instruction sets, and of a weak
// function that they share the linker might keep the AVX-512 copy for machines without AVX-512.
#pragma once

#include <math.h>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FM_MEMBER __host__ __device__ __forceinline__
#else
#define FM_MEMBER inline __attribute__((always_inline))
#endif
#define FM_INLINE static FM_MEMBER

namespace fastmargin {

// A running maximum before its first value; finite, so that the difference of two of them is 0 and not NaN.
constexpr float kNoShift = -1e30f;

// e^x for x <= 88. On a GPU: expf. On a CPU: within 1.03 ulp (measured over all floats), without branches, so that a
// loop over it vectorizes; 0 below -87.3, where the result would be denormal. x = n ln2 + r with |r| <= ln2 / 2; ln2
// is split in two so that r is exact to the last bit.
FM_INLINE float exp_(float x) {
#if defined(__CUDA_ARCH__)
  return expf(x);
#else
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
  const float t = x * 1.44269504088896341f + magic;
  const float n = t - magic;
  const float r = (x - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  uint32_t bits, exponent;
  memcpy(&exponent, &t, 4);
  memcpy(&bits, &p, 4);
  bits += exponent << 23;
  float result;
  memcpy(&result, &bits, 4);
  return x < -87.3f ? 0.0f : (x == x ? result : x);
#endif
}

FM_INLINE double exp_(double x) { return ::exp(x); }

// A bfloat16 number: the upper half of a float32.
enum class Bf16 : uint16_t {};

// x rounded to bfloat16, to the nearest, ties to even, as the bits of a float32 whose lower half is 0. NaN stays NaN.
FM_INLINE uint32_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return x == x ? rounded : 0x7fc00000u;
}

// x as an operand of a matrix product: itself, or rounded. The second argument only selects the type.
template <typename T>
FM_INLINE T rounded(T x, T) {
  return x;
}
FM_INLINE Bf16 rounded(float x, Bf16) { return Bf16(bf16_bits(x) >> 16); }

// The number that turns a sum of exp(z - from) into a sum of exp(z - to).
template <typename T>
FM_INLINE T rescale(T from, T to) {
  return from == to ? T(1) : exp_(from - to);
}

// Log-sum-exp as shift + log(sum); shift is the largest exponent so far.
template <typename T>
struct Running {
  T shift, sum;
};

// merge(a, b) and merge(b, a) are equal bit for bit: both partners of a shuffle compute the same.
template <typename T>
FM_INLINE Running<T> merge(const Running<T>& a, const Running<T>& b) {
  const T shift = a.shift > b.shift ? a.shift : b.shift;
  return {shift, a.sum * rescale(a.shift, shift) + b.sum * rescale(b.shift, shift)};
}

// Puts (value, index) into the sorted list of the k best. Callers offer indices in ascending order and only values
// above the last of the list, so equal values keep the smaller index.
template <typename T>
FM_INLINE void insert(T* values, int64_t* indices, int64_t k, T value, int64_t index) {
  int64_t p = k - 1;
  for (; p > 0 && value > values[p - 1]; --p) {
    values[p] = values[p - 1];
    indices[p] = indices[p - 1];
  }
  values[p] = value;
  indices[p] = index;
}

// g of one non-target logit. Where there is no other class, the caller passes a huge `rest`: g is 0.
template <typename T>
FM_INLINE T gradient(T z, T rest, T d_rest) {
  return d_rest * exp_(z - rest);
}

}  // namespace fastmargin
