// The kernels that class_update.cpp calls, as a table of function pointers: one table per type and CPU capability.
#pragma once

#include <cstdint>

#include "../optimizer_step.h"

namespace fastmargin {

// A class weight and its optimizer states; a state that the rule does not use is null.
template <typename T>
struct ClassRow {
  T *w, *first, *second;  // [d]
};

template <typename T>
struct ClassUpdateKernels {
  // A step with the gradient g * scale. With skip_not_finite: false, and no step, where g is not finite.
  bool (*sgd)(const Sgd&, const ClassRow<T>&, const T* g /* [d] */, T scale, bool skip_not_finite, int64_t d);
  bool (*adamw)(const AdamW&, const ClassRow<T>&, const T* g /* [d] */, T scale, bool skip_not_finite, int64_t d);
  // (first, w) := p (first, w) for each number, p [4] = a 2 x 2 matrix by rows
  void (*transform)(const ClassRow<T>&, const T* p /* [4] */, int64_t d);
};

template <typename T>
const ClassUpdateKernels<T>& class_update_kernels();  // the table for this machine

}  // namespace fastmargin
