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
void turn(const T* in, int64_t n, int64_t d, int64_t padded, T* out) {
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
void centre(const T* points, const T* mean, int64_t n, int64_t padded, int64_t d, T* centred, T* turned, T* squares) {
  for (int64_t i = 0; i < n; ++i) {
    const T* in = points + i * d;
    T* out = centred + i * d;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < d; ++c) {
      out[c] = in[c] - mean[c];
      sum += out[c] * out[c];
    }
    squares[i] = sum;
  }
  memset(centred + n * d, 0, (padded - n) * d * sizeof(T));
  for (int64_t i = n; i < padded; ++i) squares[i] = T(INFINITY);
  if (turned) turn(centred, n, d, padded, turned);
}

// The slope of a pair at both ends, from the difference itself.
template <typename T>
void add_slope(const Side<T>& a, const Side<T>& b, int64_t i, int64_t j, int64_t d, bool both, T pull) {
  const T *from = a.points + i * d, *to = b.points + j * d;
  T *one = a.slope + i * d, *two = b.slope + j * d;
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) one[c] += pull * (from[c] - to[c]);
  if (!both) return;
#pragma omp simd
  for (int64_t c = 0; c < d; ++c) two[c] += pull * (to[c] - from[c]);
}

// Near pairs of row i are counted here, by their differences, and leave the tile for an infinite distance.
template <typename T, typename Phi>
void count_near(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t i, int64_t d, bool both, T* u,
                double& potential) {
  for (int64_t j = 0; j < b.n; ++j) {
    if (b.id[j] == a.id[i] || !near(u[j], a.squares[i] + b.squares[j])) continue;
    const Potential<T> p = phi.at(squared_distance(a.points + i * d, b.points + j * d, d));
    potential += double(p.value * b.weight[j]);
    if (both) b.potential[j] += double(p.value);
    if (a.slope && p.slope != 0) add_slope(a, b, i, j, d, both, p.slope * b.weight[j]);
    u[j] = T(INFINITY);
  }
}

template <bool both, typename T, typename Phi>
void sweep_row(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t i, int64_t d, T* u, T* values /* [n] */,
               Pull<T>& pull) {
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
  if (close) count_near(phi, a, b, i, d, both, u, potential);
  T total = 0, sum = 0, any = 0;
#pragma omp simd reduction(+ : total, sum, any)
  for (int64_t j = 0; j < b.padded; ++j) {
    const Potential<T> p = phi.at(ids[j] == id ? T(INFINITY) : u[j]);
    const T slope = p.slope * weight[j];
    total += p.value * weight[j];
    sum += slope;
    any += p.slope;
    u[j] = -slope;
    if constexpr (both) {
      values[j] += p.value;
      pull.col[j] += slope;
    }
  }
  a.potential[i] += potential + double(total);
  pull.row[i] = sum;
  pull.active |= any != 0;  // before the weights, slopes have one sign
}

template <bool both, typename T, typename Phi>
void sweep_tile(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t d, T* u, Pull<T>& pull) {
  T values[kSide] = {};
  for (int64_t j = 0; j < b.padded; ++j) pull.col[j] = 0;
  pull.active = false;
  for (int64_t i = 0; i < a.n; ++i) sweep_row<both>(phi, a, b, i, d, u + i * b.padded, values, pull);
  if (both)
    for (int64_t j = 0; j < b.n; ++j) b.potential[j] += double(values[j]);
}

template <typename T, typename Phi>
void sweep(const Phi& phi, const Side<T>& a, const Side<T>& b, int64_t d, bool both, T* u, Pull<T>& pull) {
  both ? sweep_tile<true>(phi, a, b, d, u, pull) : sweep_tile<false>(phi, a, b, d, u, pull);
}

template <typename T>
void pull_back(const T* pull, const T* centred, int64_t n, int64_t d, T* slope) {
  for (int64_t i = 0; i < n; ++i) {
    const T p = pull[i], *in = centred + i * d;
    T* out = slope + i * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] += p * in[c];
  }
}

}  // namespace

#define FM_TABLE(T, name)                                                                                          \
  extern const PairKernels<T> FM_CONCAT(pair_kernels_##name##_, CPU_CAPABILITY);                                   \
  const PairKernels<T> FM_CONCAT(pair_kernels_##name##_, CPU_CAPABILITY) = {centre<T>, turn<T>, sweep<T, Inverse>, \
                                                                            sweep<T, Hinge>, pull_back<T>};
FM_TABLE(float, float)
FM_TABLE(double, double)

}  // namespace fastmargin
