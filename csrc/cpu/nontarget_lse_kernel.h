// What nontarget_lse.cpp asks of a compiled kernel object; there is one such table per CPU capability.
#pragma once

#include <cstdint>

namespace fastmargin {

// A tile of n classes x m rows, class-major: a class is one line, so its norm and bias are scalars of the inner loop
// and sums over classes need no horizontal additions.
template <typename T>
struct Tile {
  T* z;                   // [n, m] products <x_i, w_j>; a sweep overwrites them
  int64_t n, m;           //
  int64_t first;          // class id of line 0
  const T* scale;         // [n] 1/||w_j||, or 1
  const T* bias;          // [n], or null
  const int32_t* target;  // [m] line of the row's own class, or -1
};

template <typename T>
struct LseState {
  T* shift;          // [m] exponent offset
  T* sum;            // [m] sum over this tile of exp(z - shift), overwritten
  T* threshold;      // [m] the k-th best value so far; +inf where k = 0
  T* top_values;     // [m, k]
  int64_t* top_ids;  // [m, k]
  int64_t k;
};

template <typename T>
struct GradRows {
  const T* rest;      // [m], +huge where there is no other class
  const T* d_rest;    // [m]
  const T* d_target;  // [m]
};

template <typename T>
struct NontargetLseKernels {
  // 1/||w_j||, 0 below 1e-12
  void (*inverse_norms)(const T* w /* [n, d] */, int64_t ld, int64_t n, int64_t d, T* out /* [n] */);
  // running maximum of the non-target logits of each row
  void (*row_max)(const Tile<T>&, T* top /* [m] */);
  // z -> scale * exp(z - shift), 0 at the targets; sets the sums, adds to the best k
  void (*lse)(const Tile<T>&, const LseState<T>&);
  // [n, m] -> [m, n]
  void (*transpose)(const T* in, int64_t n, int64_t m, T* out);
  // z -> g; per class sum_i g and sum_i g z
  void (*gradient)(const Tile<T>&, const GradRows<T>&, T* sum_g /* [n] */, T* sum_gz /* [n] */);
  // dw_j = scale_j (dw_j - sum_gz_j scale_j w_j)
  void (*project)(const T* w /* [n, d] */, int64_t ld, int64_t n, int64_t d, const T* scale /* [n] */,
                  const T* sum_gz /* [n] */, T* dw /* [n, d] */);
  // <a, b>
  T (*dot)(const T* a /* [d] */, const T* b /* [d] */, int64_t d);
};

template <typename T>
const NontargetLseKernels<T>& nontarget_lse_kernels();  // the table for this machine

}  // namespace fastmargin
