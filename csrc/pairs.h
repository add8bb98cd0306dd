// The arithmetic of a pair of points; plain C++ that a GPU compiler takes too.
//
//   u        = |a|^2 + |b|^2 - 2 <a, b>, of points less a common mean; from the difference itself where that is small
//   inverse    phi = 1 / (1 + u)       2 phi' = -2 phi^2
//   hinge      phi = max(M - u, 0)     2 phi' = -2 where u < M
//
// A pair that must not count is put at an infinite distance: phi and phi' are 0 there.
#pragma once

#include "tile.h"

namespace fastmargin {

// phi and 2 phi' of one pair.
template <typename T>
struct Potential {
  T value, slope;
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
    return {left < T(0) ? T(0) : left, left > T(0) ? T(-2) : T(0)};  // not a number stays one
  }
};

// Below this share of |a|^2 + |b|^2 a squared distance from products has lost too many digits.
template <typename T>
FM_INLINE bool near(T u, T squares) {
  return u < T(1e-2) * squares;
}

}  // namespace fastmargin
