// The sweeps over one tile of pairs. Compiled once per CPU capability (CMakeLists.txt); no ATen and no std templates.
#include "pairwise_potential_kernel.h"

#include "by_capability.h"

namespace fastmargin {
namespace {

template <typename T>
T squared_distance(const T* a, const T* b, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) sum += (a[c] - b[c]) * (a[c] - b[c]);
  return sum;
}

template <typename T>
void transpose(const T* in, int64_t n, int64_t d, int64_t padded, T* out) {
  constexpr int64_t side = 16;
  for (int64_t c0 = 0; c0 < d; c0 += side)
    for (int64_t i0 = 0; i0 < padded; i0 += side) {
      const int64_t c1 = c0 + side < d ? c0 + side : d, i1 = i0 + side < n ? i0 + side : n;
      for (int64_t c = c0; c < c1; ++c) {
        for (int64_t i = i0; i < i1; ++i) out[c * padded + i] = in[i * d + c];
        for (int64_t i = i1; i < i0 + side; ++i) out[c * padded + i] = 0;
      }
    }
}

template <typename T>
void center(const T* points, const T* mean, int64_t n, int64_t padded, int64_t d, T* centered, T* transposed,
            T* squares) {
  for (int64_t i = 0; i < n; ++i) {
    const T* in = points + i * d;
    T* out = centered + i * d;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < d; ++c) {
      out[c] = in[c] - mean[c];
      sum += out[c] * out[c];
    }
    squares[i] = sum;
  }
  memset(centered + n * d, 0, (padded - n) * d * sizeof(T));
  for (int64_t i = n; i < padded; ++i) squares[i] = T(INFINITY);
  if (transposed) transpose(centered, n, d, padded, transposed);
}

// Adds the slope of one pair, from the difference of its points: to a's point, and with `both` to b's, too.
template <typename T>
void add_slope(const Side<T>& a, const Side<T>& b, int64_t i, int64_t j, int64_t d, bool both, T coefficient) {
  const T *from = a.points + i * d, *to = b.points + j * d;
  T *one = a.slope + i * d, *two = b.slope + j * d;
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) one[c] += coefficient * (from[c] - to[c]);
  if (!both) return;
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) two[c] += coefficient * (to[c] - from[c]);
}

// Adds the near pairs of row i, computed from differences. In u their distance becomes infinite, so that the sweep over
// the tile counts them no more.
template <typename T, typename Phi>
void add_near(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t i, int64_t d, bool both, T* u,
              double& potential) {
  for (int64_t j = 0; j < b.n; ++j) {
    if (b.id[j] == a.id[i] || !near(u[j], a.squares[i] + b.squares[j])) continue;
    const Potential<T> p = phi.at(squared_distance(a.points + i * d, b.points + j * d, d));
    potential += double(p.value * b.weight[j]);
    if (both) b.potential[j] += double(p.value);
    if (a.slope && p.coefficient != 0) add_slope(a, b, i, j, d, both, p.coefficient * b.weight[j]);
    u[j] = T(INFINITY);
  }
}

template <bool both, typename T, typename Phi>
void sweep_row(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t i, int64_t d, T* u, T* values /* [n] */,
               CoefficientSums<T>& sums) {
  const T square = a.squares[i];
  const int32_t id = a.id[i];
  const T *squares = b.squares, *weight = b.weight;
  const int32_t* ids = b.id;
  int32_t close = 0;
#pragma omp simd reduction(+ : close)
  for (int64_t j = 0; j < b.padded; ++j) {
    const T sum = square + squares[j], v = sum - 2 * u[j];
    close += near(v, sum) & (ids[j] != id);
    u[j] = v;
  }
  double potential = 0;
  if (close) add_near(phi, a, b, i, d, both, u, potential);
  T total = 0, sum = 0, any = 0;
#pragma omp simd reduction(+ : total, sum, any)
  for (int64_t j = 0; j < b.padded; ++j) {
    const Potential<T> p = phi.at(ids[j] == id ? T(INFINITY) : u[j]);
    const T coefficient = p.coefficient * weight[j];
    total += p.value * weight[j];
    sum += coefficient;
    any += p.coefficient;
    u[j] = -coefficient;
    if constexpr (both) {
      values[j] += p.value;
      sums.col[j] += coefficient;
    }
  }
  a.potential[i] += potential + double(total);
  sums.row[i] = sum;
  sums.active |= any != 0;  // without the weights, all have one sign: they cannot cancel
}

template <bool both, typename T, typename Phi>
void sweep_tile(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t d, T* u, CoefficientSums<T>& sums) {
  T values[kSide] = {};
  for (int64_t j = 0; j < b.padded; ++j) sums.col[j] = 0;
  sums.active = false;
  for (int64_t i = 0; i < a.n; ++i) sweep_row<both>(phi, a, b, i, d, u + i * b.padded, values, sums);
  if (both)
    for (int64_t j = 0; j < b.n; ++j) b.potential[j] += double(values[j]);
}

template <typename T, typename Phi>
void sweep(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u, CoefficientSums<T>& sums) {
  both ? sweep_tile<true>(phi, a, b, d, u, sums) : sweep_tile<false>(phi, a, b, d, u, sums);
}

template <typename T>
void add_scaled(const T* coefficients, const T* centered, int64_t n, int64_t d, T* slope) {
  for (int64_t i = 0; i < n; ++i) {
    const T p = coefficients[i], *in = centered + i * d;
    T* out = slope + i * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] += p * in[c];
  }
}

}  // namespace

#define FM_TABLE(T, name)                                                        \
  extern const PairKernels<T> FM_CONCAT(pair_kernels_##name##_, CPU_CAPABILITY); \
  const PairKernels<T> FM_CONCAT(pair_kernels_##name##_, CPU_CAPABILITY) = {     \
      center<T>, transpose<T>, sweep<T, Inverse>, sweep<T, Hinge>, add_scaled<T>};
FM_TABLE(float, float)
FM_TABLE(double, double)

}  // namespace fastmargin
