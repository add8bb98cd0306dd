// The arithmetic of one pair of points; plain C++ that nvcc compiles, too.
//
//   u        = |a|^2 + |b|^2 - 2 <a, b>, a common mean subtracted from both; |a - b|^2 itself where u is small
//   inverse    phi = 1 / (1 + u)       2 phi' = -2 phi^2
//   hinge      phi = max(M - u, 0)     2 phi' = -2 where u < M
//
// A pair that must not count is given an infinite distance: phi and phi' are 0 there.
#pragma once

#include "tile.h"

namespace fastmargin {

// phi(u) of one pair, and 2 phi'(u): the coefficient of a - b in the gradient.
template <typename T>
struct Potential {
  T value, coefficient;
};

struct Inverse {
  template <typename T>
  FM_MEMBER Potential<T> at(T u) const {
    const T p = T(1) / (T(1) + u);
    return {p, T(-2) * p * p};
  }
};

struct Hinge {
  double margin;
  template <typename T>
  FM_MEMBER Potential<T> at(T u) const {
    const T left = T(margin) - u;
    return {left < T(0) ? T(0) : left, left > T(0) ? T(-2) : T(0)};  // NaN stays NaN
  }
};

// Whether u, computed from products, is so small beside |a|^2 + |b|^2 that it has lost too many digits.
template <typename T>
FM_INLINE bool near(T u, T squares) {
  return u < T(1e-2) * squares;
}

}  // namespace fastmargin
