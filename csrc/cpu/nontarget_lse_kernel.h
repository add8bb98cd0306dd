// The kernels that nontarget_lse_fwd.cpp and _bwd.cpp call, as a table of function pointers: one table per operand type
// and CPU capability.
#pragma once

#include <cstdint>

#include "../tile.h"

namespace fastmargin {

// The operands of the matrix products are of type O; logits, sums and gradients are of type Sum. The right operand of a
// product, [k, n], is in VNNI layout: `lanes` consecutive rows are interleaved in words, words [k / lanes, n].
template <typename O>
struct Operand {
  using Sum = O;
  using Word = O;
  static constexpr int64_t lanes = 1;
};
template <>
struct Operand<Bf16> {
  using Sum = float;
  using Word = uint32_t;  // two bfloat16, the earlier row in the lower half
  static constexpr int64_t lanes = 2;
};
template <typename O>
using Sum = typename Operand<O>::Sum;
template <typename O>
using Word = typename Operand<O>::Word;

// A tile of n classes x m rows of x, class-major: the inner loop runs over rows, so a class's norm and bias are scalars
// in it, and sums over classes need no horizontal additions.
template <typename T>
struct Tile {
  T* z;                   // [n, m] products <x_i, w_j>
  int64_t n, m;           //
  int64_t first;          // class index of the tile's first class
  const T* scale;         // [n] 1/||w_j||, or 1
  const T* bias;          // [n], or null
  const int32_t* target;  // [m] index in this tile of the row's own class, or -1
};

template <typename T>
struct LseState {
  T* shift;               // [m] exponent offset
  T* sum;                 // [m] sum over this tile of exp(z - shift), overwritten
  T* threshold;           // [m] the k-th best value so far; +inf where k = 0
  T* topk_values;         // [m, k]
  int64_t* topk_classes;  // [m, k] class indices
  int64_t k;
};

template <typename T>
struct GradRows {
  const T* rest;    // [m], +huge where there is no other class
  const T* d_rest;  // [m]
};

template <typename O>
struct NontargetLseKernels {
  using T = Sum<O>;
  using W = Word<O>;
  // 1/||w_j||, 0 below 1e-12
  void (*inverse_norms)(const T* w /* [n, d] */, int64_t ld, int64_t n, int64_t d, T* out /* [n] */);
  // [n, m] -> [m, n]
  void (*transpose)(const W* in, int64_t n, int64_t m, W* out);
  // raises top to the largest non-target logit of each row
  void (*row_max)(const Tile<T>&, T* top /* [m] */);
  // e = scale * exp(z - shift), 0 at the targets, as operand of a product; sets the sums, adds to the best k
  void (*lse)(const Tile<T>&, const LseState<T>&, W* e /* [n / lanes, m], may be z */);
  // g, 0 at the targets, as operand of a product; adds sum_i g of each class
  void (*gradient)(const Tile<T>&, const GradRows<T>&, O* g /* [n, m], may be z */, T* sum_g /* [n] */);
  // dw_j = scale_j (I - w^_j w^_j^T) dw_j, with w^_j = scale_j w_j
  void (*project)(const T* w /* [n, d] */, int64_t ld, int64_t n, int64_t d, const T* scale /* [n] */,
                  T* dw /* [n, d] */);
  // <a, b>
  T (*dot)(const T* a /* [d] */, const T* b /* [d] */, int64_t d);

  // Null where the products take the given numbers as they are:
  // a left operand: rows of d numbers, rounded, with zeros after them up to ld_out
  void (*round_rows)(const T* in /* [n, d] */, int64_t ld, int64_t n, int64_t d, O* out /* [n, ld_out] */,
                     int64_t ld_out) = nullptr;
  // a right operand of such rows, in VNNI layout; an odd last row is paired with itself: the left operand is 0 there
  void (*pack_vnni)(const O* in /* [n, d] */, int64_t ld, int64_t n, int64_t d, W* out /* [n / lanes, d] */) = nullptr;
};

template <typename O>
const NontargetLseKernels<O>& nontarget_lse_kernels();  // the table for this machine

}  // namespace fastmargin
