// The sweeps over one tile. Compiled once per CPU capability (CMakeLists.txt); no ATen and no std templates here.
#include "nontarget_lse_kernel.h"

#include "by_capability.h"

namespace fastmargin {
namespace {

constexpr int64_t kRowsAtOnce =
    64;  // rows handled together: a few vectors; the top-k test is made once for all of them

template <typename T>
FM_INLINE T packed(const T (*e)[kRowsAtOnce], int64_t i, T) {
  return e[0][i];
}
FM_INLINE uint32_t packed(const float (*e)[kRowsAtOnce], int64_t i, uint32_t) {
  return bf16_bits(e[0][i]) >> 16 | bf16_bits(e[1][i]);
}

template <typename T>
T dot(const T* a, const T* b, int64_t d) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < d; ++c) sum += a[c] * b[c];
  return sum;
}

template <typename T>
void inverse_norms(const T* w, int64_t ld, int64_t n, int64_t d, T* out) {
  for (int64_t j = 0; j < n; ++j) {
    const T norm = T(::sqrt(double(dot(w + j * ld, w + j * ld, d))));
    out[j] = norm < T(1e-12) ? T(0) : T(1) / norm;
  }
}

[[maybe_unused]] void round_rows(const float* in, int64_t ld, int64_t n, int64_t d, Bf16* out, int64_t ld_out) {
  for (int64_t j = 0; j < n; ++j) {
    const float* row = in + j * ld;
    Bf16* to = out + j * ld_out;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) to[c] = rounded(row[c], Bf16());
    for (int64_t c = d; c < ld_out; ++c) to[c] = Bf16();
  }
}

[[maybe_unused]] void pack_vnni(const Bf16* in, int64_t ld, int64_t n, int64_t d, uint32_t* out) {
  for (int64_t j = 0; j < n; j += 2) {
    const Bf16 *low = in + j * ld, *high = j + 1 < n ? low + ld : low;
    uint32_t* words = out + j / 2 * d;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) words[c] = uint32_t(low[c]) | uint32_t(high[c]) << 16;
  }
}

template <typename W>
void transpose(const W* in, int64_t n, int64_t m, W* out) {
  constexpr int64_t side = 16;
  for (int64_t j0 = 0; j0 < n; j0 += side)
    for (int64_t i0 = 0; i0 < m; i0 += side) {
      const int64_t j1 = j0 + side < n ? j0 + side : n, i1 = i0 + side < m ? i0 + side : m;
      for (int64_t i = i0; i < i1; ++i)
        for (int64_t j = j0; j < j1; ++j) out[i * n + j] = in[j * m + i];
    }
}

template <typename T>
void row_max(const Tile<T>& t, T* top) {
  const int32_t* target = t.target;
  for (int64_t j = 0; j < t.n; ++j) {
    const T* z = t.z + j * t.m;
    const T scale = t.scale[j], bias = t.bias ? t.bias[j] : T(0);
    const int32_t index = int32_t(j);
#pragma omp simd
    for (int64_t i = 0; i < t.m; ++i) {
      const T v = z[i] * scale + bias;
      const bool better = v > top[i] && target[i] != index;
      top[i] = better ? v : top[i];
    }
  }
}

// Adds the logits of one class that beat the k-th best of their rows; rare, so a scalar loop will do.
template <typename T>
void offer(const LseState<T>& s, const T* v, const int32_t* target, int32_t index, int64_t i0, int64_t count,
           int64_t class_index) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = i0 + i;
    if (v[i] > s.threshold[row] && target[row] != index) {
      insert(s.topk_values + row * s.k, s.topk_classes + row * s.k, s.k, v[i], class_index);
      s.threshold[row] = s.topk_values[row * s.k + s.k - 1];
    }
  }
}

// One class, `count` rows from row i0.
template <typename T>
FM_INLINE void lse_class(const Tile<T>& t, const LseState<T>& s, int64_t j, int64_t i0, int64_t count,
                         T* e /* [count] */) {
  const T scale = t.scale[j], bias = t.bias ? t.bias[j] : T(0);
  const int32_t index = int32_t(j);
  const T *z = t.z + j * t.m + i0, *shift = s.shift + i0, *threshold = s.threshold + i0;
  const int32_t* target = t.target + i0;
  T* sum = s.sum + i0;
  T v[kRowsAtOnce];
  int32_t hits = 0;
#pragma omp simd reduction(+ : hits)
  for (int64_t i = 0; i < count; ++i) {
    v[i] = z[i] * scale + bias;
    const T p = target[i] == index ? T(0) : exp_(v[i] - shift[i]);
    hits += v[i] > threshold[i];
    sum[i] += p;
    e[i] = p * scale;
  }
  if (hits) offer(s, v, t.target, index, i0, count, t.first + j);
}

template <typename O>
void lse(const Tile<Sum<O>>& t, const LseState<Sum<O>>& s, Word<O>* out) {
  constexpr int64_t lanes = Operand<O>::lanes;
  for (int64_t i = 0; i < t.m; ++i) s.sum[i] = 0;
  for (int64_t j = 0; j < t.n; j += lanes)
    for (int64_t i0 = 0; i0 < t.m; i0 += kRowsAtOnce) {
      const int64_t count = t.m - i0 < kRowsAtOnce ? t.m - i0 : kRowsAtOnce;
      Sum<O> e[lanes][kRowsAtOnce];
      for (int64_t l = 0; l < lanes; ++l)
        if (j + l < t.n)
          lse_class(t, s, j + l, i0, count, e[l]);
        else
          memset(e[l], 0, sizeof(e[l]));
      Word<O>* words = out + j / lanes * t.m + i0;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) words[i] = packed(e, i, Word<O>());
    }
}

template <typename O>
void gradient_sweep(const Tile<Sum<O>>& t, const GradRows<Sum<O>>& r, O* g, Sum<O>* sum_g) {
  using T = Sum<O>;
  const T *rest = r.rest, *d_rest = r.d_rest;
  const int32_t* target = t.target;
  for (int64_t j = 0; j < t.n; ++j) {
    const T* z = t.z + j * t.m;
    O* out = g + j * t.m;
    const T scale = t.scale[j], bias = t.bias ? t.bias[j] : T(0);
    const int32_t index = int32_t(j);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < t.m; ++i) {
      const T value = target[i] == index ? T(0) : gradient(z[i] * scale + bias, rest[i], d_rest[i]);
      sum += value;
      out[i] = rounded(value, O());
    }
    sum_g[j] += sum;
  }
}

template <typename T>
void project(const T* w, int64_t ld, int64_t n, int64_t d, const T* scale, T* dw) {
  for (int64_t j = 0; j < n; ++j) {
    const T* row = w + j * ld;
    T* out = dw + j * d;
    const T a = scale[j], b = dot(out, row, d) * a * a * a;
#pragma omp simd
    for (int64_t c = 0; c < d; ++c) out[c] = a * out[c] - b * row[c];
  }
}

template <typename O>
constexpr NontargetLseKernels<O> table() {
  using T = Sum<O>;
  NontargetLseKernels<O> k{inverse_norms<T>,  transpose<Word<O>>, row_max<T>, lse<O>,
                           gradient_sweep<O>, project<T>,         dot<T>};
  if constexpr (Operand<O>::lanes > 1) k.round_rows = round_rows, k.pack_vnni = pack_vnni;
  return k;
}

}  // namespace

#define FM_TABLE(O, name)                                                                 \
  extern const NontargetLseKernels<O> FM_CONCAT(nontarget_lse_##name##_, CPU_CAPABILITY); \
  const NontargetLseKernels<O> FM_CONCAT(nontarget_lse_##name##_, CPU_CAPABILITY) = table<O>();
FM_TABLE(float, float)
FM_TABLE(double, double)
#ifdef CPU_CAPABILITY_AVX512  // the only machines that multiply bfloat16
FM_TABLE(Bf16, bfloat16)
#endif

}  // namespace fastmargin
