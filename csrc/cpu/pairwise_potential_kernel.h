// What pairwise_potential.cpp asks of a compiled kernel object; there is one such table per type and CPU capability.
#pragma once

#include <cstdint>

#include "../pairs.h"

namespace fastmargin {

constexpr int64_t kSide = 256;  // points on a side of a tile, at most

// One side of a tile. Points come in multiples of 16: after the last there are zeros, at an infinite distance.
template <typename T>
struct Side {
  const T* points;    // [n, d] as given
  const T* centred;   // [padded, d] less the mean
  const T* turned;    // [d, padded] the same; null for rows
  const T* squares;   // [padded] of the centred; +inf after the last
  const int32_t* id;  // [padded]
  const T* weight;    // [padded]
  int64_t n, padded;
  // sums, added to
  double* potential;  // [n]
  T* slope;           // [padded, d], or null
};

// What a sweep over a tile leaves for the product that follows.
template <typename T>
struct Pull {
  T* row;       // [a.n] sum of 2 phi' over the row
  T* col;       // [b.padded] over the column
  bool active;  // whether any pair has a slope
};

template <typename T>
struct PairKernels {
  // centred, turned (if not null) and squares of n points
  void (*centre)(const T* points /* [n, d] */, const T* mean /* [d] */, int64_t n, int64_t padded, int64_t d,
                 T* centred /* [padded, d] */, T* turned /* [d, padded] */, T* squares /* [padded] */);
  // out [d, padded] of in [n, d], zeros after the n
  void (*turn)(const T* in, int64_t n, int64_t d, int64_t padded, T* out);
  // The products u [a.padded, b.padded] become -2 phi' of the pairs with different ids, times the weight of the column.
  // Adds potentials of rows, and of columns if `both`; adds the slopes of near pairs, which become 0 in u.
  void (*inverse)(const Inverse&, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u, Pull<T>& pull);
  void (*hinge)(const Hinge&, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u, Pull<T>& pull);
  // slope_i += pull_i centred_i
  void (*pull_back)(const T* pull /* [n] */, const T* centred /* [n, d] */, int64_t n, int64_t d,
                    T* slope /* [n, d] */);

  void sweep(const Inverse& phi, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u, Pull<T>& pull) const {
    inverse(phi, a, b, d, both, u, pull);
  }
  void sweep(const Hinge& phi, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u, Pull<T>& pull) const {
    hinge(phi, a, b, d, both, u, pull);
  }
};

template <typename T>
const PairKernels<T>& pair_kernels();  // the table for this machine

}  // namespace fastmargin
