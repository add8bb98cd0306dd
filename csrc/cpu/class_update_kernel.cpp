// One class weight after the other. Compiled once per CPU capability (CMakeLists.txt); no ATen and no std templates.
#include "class_update_kernel.h"

#include "by_capability.h"

namespace fastmargin {
namespace {

template <typename T>
bool is_finite(const T* g, T scale, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) sum += g[c] * scale * T(0);
  return sum == T(0);
}

template <bool one, bool two, typename T, typename Rule>
FM_INLINE void step(const Rule rule, const ClassRow<T> row, const T* g, T scale, int64_t d) {
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) {
    T first = one ? row.first[c] : T(0), second = two ? row.second[c] : T(0);
    rule.step(row.w[c], first, second, g[c] * scale);
    if constexpr (one) row.first[c] = first;
    if constexpr (two) row.second[c] = second;
  }
}

template <typename T>
bool sgd(const Sgd& rule, const ClassRow<T>& row, const T* g, T scale, bool skip_not_finite, int64_t d) {
  if (skip_not_finite && !is_finite(g, scale, d)) return false;
  row.first ? step<true, false>(rule, row, g, scale, d) : step<false, false>(rule, row, g, scale, d);
  return true;
}

template <typename T>
bool adamw(const AdamW& rule, const ClassRow<T>& row, const T* g, T scale, bool skip_not_finite, int64_t d) {
  if (skip_not_finite && !is_finite(g, scale, d)) return false;
  step<true, true>(rule, row, g, scale, d);
  return true;
}

template <typename T>
void transform(const ClassRow<T>& row, const T* p, int64_t d) {
  T *w = row.w, *v = row.first;
  const T vv = p[0], vw = p[1], wv = p[2], ww = p[3];
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) {
    const T old_v = v ? v[c] : T(0), old_w = w[c];
    if (v) v[c] = vv * old_v + vw * old_w;
    w[c] = wv * old_v + ww * old_w;
  }
}

}  // namespace

#define FM_TABLE(T, name)                                                               \
  extern const ClassUpdateKernels<T> FM_CONCAT(class_update_##name##_, CPU_CAPABILITY); \
  const ClassUpdateKernels<T> FM_CONCAT(class_update_##name##_, CPU_CAPABILITY) = {sgd<T>, adamw<T>, transform<T>};
FM_TABLE(float, float)
FM_TABLE(double, double)

}  // namespace fastmargin
