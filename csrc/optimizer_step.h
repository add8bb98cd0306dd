// One optimizer step of one element of a class weight; plain C++ that nvcc compiles, too.
//
//   sgd      g += lam w;  v = mu v + g;  w -= lr v,  or with Nesterov momentum  w -= lr (g + mu v)
//   adamw    w -= lr lam w;  m += (1 - b1)(g - m);  s += (1 - b2)(g^2 - s);  w -= (lr / c1) m / (sqrt(s / c2) + eps)
//
// The rules of torch.optim.SGD (dampening 0) and torch.optim.AdamW; c1 = 1 - b1^t, c2 = 1 - b2^t of step t.
#pragma once

#include "tile.h"

namespace fastmargin {

// The hyper-parameters of a rule. step() takes a weight and two optimizer states, of which a rule may use fewer.
struct Sgd {
  double lr, momentum, weight_decay;
  bool nesterov;

  template <typename T>
  FM_MEMBER void step(T& w, T& v, T&, T g) const {
    g += T(weight_decay) * w;
    v = T(momentum) * v + g;
    w -= T(lr) * (nesterov ? g + T(momentum) * v : v);
  }
};

struct AdamW {
  double lr, weight_decay, beta1, beta2, eps, correction1, root_correction2;

  template <typename T>
  FM_MEMBER void step(T& w, T& m, T& s, T g) const {
    w -= T(lr * weight_decay) * w;
    m += T(1 - beta1) * (g - m);
    s += T(1 - beta2) * (g * g - s);
    w -= T(lr / correction1) * m / (root(s) / T(root_correction2) + T(eps));
  }
  static FM_MEMBER float root(float s) { return sqrtf(s); }
  static FM_MEMBER double root(double s) { return ::sqrt(s); }
};

}  // namespace fastmargin
