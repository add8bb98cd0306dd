// The sweeps over one tile. Compiled once per CPU capability (CMakeLists.txt); no ATen and no std templates here.
#include "nontarget_lse_kernel.h"

#include "../tile.h"

#define FM_CONCAT_(a, b) a##b
#define FM_CONCAT(a, b) FM_CONCAT_(a, b)

namespace fastmargin {
namespace {

constexpr int64_t kLanes = 64;  // rows handled together: a few vectors, and the grain of the top-k test

template <typename T>
void inverse_norms(const T* w, int64_t ld, int64_t n, int64_t d, T* out) {
  for (int64_t j = 0; j < n; ++j) {
    const T* row = w + j * ld;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < d; ++c) sum += row[c] * row[c];
    const T norm = T(::sqrt(double(sum)));
    out[j] = norm < T(1e-12) ? T(0) : T(1) / norm;
  }
}

template <typename T>
void row_max(const Tile<T>& t, T* top) {
  const int32_t* target = t.target;
  for (int64_t j = 0; j < t.n; ++j) {
    const T* z = t.z + j * t.m;
    const T scale = t.scale[j], bias = t.bias ? t.bias[j] : T(0);
    const int32_t line = int32_t(j);
#pragma omp simd
    for (int64_t i = 0; i < t.m; ++i) {
      const T v = z[i] * scale + bias;
      const bool better = v > top[i] && target[i] != line;
      top[i] = better ? v : top[i];
    }
  }
}

// The rows of one line whose logit beats their k-th best; rare, so it may be scalar.
template <typename T>
void offer(const LseState<T>& s, const T* v, const int32_t* target, int32_t line, int64_t i0, int64_t count,
           int64_t id) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i0 + i;
    if (v[i] > s.threshold[row] && target[row] != line) {
      insert(s.top_values + row * s.k, s.top_ids + row * s.k, s.k, v[i], id);
      s.threshold[row] = s.top_values[row * s.k + s.k - 1];
    }
  }
}

template <typename T>
void lse(const Tile<T>& t, const LseState<T>& s) {
  for (int64_t i = 0; i < t.m; ++i) s.sum[i] = 0;
  for (int64_t j = 0; j < t.n; ++j) {
    const T scale = t.scale[j], bias = t.bias ? t.bias[j] : T(0);
    const int32_t line = int32_t(j);
    for (int64_t i0 = 0; i0 < t.m; i0 += kLanes) {
      const int64_t count = t.m - i0 < kLanes ? t.m - i0 : kLanes;
      T* z = t.z + j * t.m + i0;
      const T *shift = s.shift + i0, *threshold = s.threshold + i0;
      const int32_t* target = t.target + i0;
      T* sum = s.sum + i0;
      T v[kLanes];
      int32_t hits = 0;
#pragma omp simd reduction(+ : hits)
      for (int64_t i = 0; i < count; ++i) {
        v[i] = z[i] * scale + bias;
        const T e = target[i] == line ? T(0) : exp_(v[i] - shift[i]);
        hits += v[i] > threshold[i];
        sum[i] += e;
        z[i] = e * scale;
      }
      if (hits) offer(s, v, t.target, line, i0, count, t.first + j);
    }
  }
}

template <typename T>
void transpose(const T* in, int64_t n, int64_t m, T* out) {
  constexpr int64_t side = 16;
  for (int64_t j0 = 0; j0 < n; j0 += side)
    for (int64_t i0 = 0; i0 < m; i0 += side) {
      const int64_t j1 = j0 + side < n ? j0 + side : n, i1 = i0 + side < m ? i0 + side : m;
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) out[i * n + j] = in[j * m + i];
    }
}

template <typename T>
void gradient_sweep(const Tile<T>& t, const GradRows<T>& r, T* sum_g, T* sum_gz) {
  const T *rest = r.rest, *d_rest = r.d_rest, *d_target = r.d_target;
  const int32_t* target = t.target;
  for (int64_t j = 0; j < t.n; ++j) {
    T* z = t.z + j * t.m;
    const T scale = t.scale[j], bias = t.bias ? t.bias[j] : T(0);
    const int32_t line = int32_t(j);
    T sg = 0, sgz = 0;
#pragma omp simd reduction(+ : sg, sgz)
    for (int64_t i = 0; i < t.m; ++i) {
      const T v = z[i] * scale;
      const T g = target[i] == line ? d_target[i] : gradient(v + bias, rest[i], d_rest[i]);
      sg += g;
      sgz += g * v;
      z[i] = g;
    }
    sum_g[j] += sg;
    sum_gz[j] += sgz;
  }
}

template <typename T>
void project(const T* w, int64_t ld, int64_t n, int64_t d, const T* scale, const T* sum_gz, T* dw) {
  for (int64_t j = 0; j < n; ++j) {
    const T a = scale[j], b = sum_gz[j] * scale[j] * scale[j];
    const T* row = w + j * ld;
    T* out = dw + j * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] = a * out[c] - b * row[c];
  }
}

template <typename T>
T dot(const T* a, const T* b, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) sum += a[c] * b[c];
  return sum;
}

template <typename T>
constexpr NontargetLseKernels<T> table() {
  return {inverse_norms<T>, row_max<T>, lse<T>, transpose<T>, gradient_sweep<T>, project<T>, dot<T>};
}

}  // namespace

extern const NontargetLseKernels<float> FM_CONCAT(nontarget_lse_float_, CPU_CAPABILITY);
extern const NontargetLseKernels<double> FM_CONCAT(nontarget_lse_double_, CPU_CAPABILITY);
const NontargetLseKernels<float> FM_CONCAT(nontarget_lse_float_, CPU_CAPABILITY) = table<float>();
const NontargetLseKernels<double> FM_CONCAT(nontarget_lse_double_, CPU_CAPABILITY) = table<double>();

}  // namespace fastmargin
