// nontarget_lse on the CPU, the forward pass. The formulas are in fastmargin/ops/nontarget_lse.py.
//
//   per block of classes: z = w x^T;  e = exp(z - shift), summed and searched for the k best;  a += e^T w
//
// a is what dx needs of the other classes, so that the backward pass (nontarget_lse_bwd.cpp) has no sweep for dx.
// With compute_dtype bfloat16 the operands of the products (x, w, e) are rounded to it, and nothing else is: z and all
// sums are float32. One parallel region. Thread t owns a fixed range of blocks and private sums, merged in the order of
// t, so the result depends on the thread count and on nothing else. Tiles are kBlock classes x kRowTile rows.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../tile.h"
#include "class_blocks.h"

namespace fastmargin {

namespace {

// A fixed exponent offset needs no running maximum. With o = ln(C) / 2 the sum of C terms exp(z - o), |z| <= ||x||,
// neither overflows nor vanishes while ||x|| <= 86 - o (float32; the exponent range of float64 allows 700). bfloat16
// products take numbers below 1e-38 for 0: exp(-76) leaves room for the weight that multiplies it. Rounding x and w
// lengthens |z| by 2^-8 of itself at most, for which there is room too.
template <typename O, typename T = Sum<O>>
bool fixed_offset(const Problem<O>& p, T& offset) {
  offset = T(0.5 * std::log(double(std::max<int64_t>(p.C, 1))));
  const T limit = T(std::is_same_v<O, double> ? 700 : std::is_same_v<O, float> ? 86 : 76) - offset;
  if (!p.normalize) return false;
  for (int64_t i = 0; i < p.B; ++i)
    if (!(std::sqrt(p.kernels.dot(p.x + i * p.d, p.x + i * p.d, p.d)) <= limit)) return false;
  return true;
}

// What one thread has summed over its classes, for all rows.
template <typename T>
struct Partial {
  std::vector<T> shift, top_values, a;
  std::vector<double> sum;
  std::vector<int64_t> top_ids;

  void reset(int64_t B, int64_t d, T start, int64_t k, bool need_expected_weight) {
    shift.assign(B, start);
    sum.assign(B, 0.0);
    top_values.assign(B * k, -INFINITY);
    top_ids.assign(B * k, -1);
    if (need_expected_weight) a.assign(B * d, T(0));
  }
};

// Raises the shifts of rows i0 .. i0 + m to the maximum seen so far, and rescales what was summed at the old ones.
template <typename O, typename T = Sum<O>>
void raise_shift(const Tile<T>& tile, int64_t i0, const Problem<O>& p, Partial<T>& part, std::vector<T>& top) {
  top.assign(part.shift.begin() + i0, part.shift.begin() + i0 + tile.m);
  p.kernels.row_max(tile, top.data());
  for (int64_t i = 0; i < tile.m; ++i) {
    const int64_t row = i0 + i;
    if (top[i] == part.shift[row]) continue;
    const T factor = rescale(part.shift[row], top[i]);
    part.sum[row] *= double(factor);
    if (!part.a.empty())
      for (int64_t c = 0; c < p.d; ++c) part.a[row * p.d + c] *= factor;
    part.shift[row] = top[i];
  }
}

// a += e^T w
template <typename O, typename T = Sum<O>>
void add_attention(Block<O>& block, int64_t m, Word<O>* turned /* [m, n / lanes] */, T* a /* [m, d] */) {
  const Problem<O>& p = block.p;
  const int64_t words = at::divup(block.n, p.lanes), n = words * p.lanes;
  p.kernels.transpose(block.factors(), words, m, turned);
  gemm(m, p.d, n, reinterpret_cast<const O*>(turned), n, block.classes.right, block.classes.ld_right, a, p.d, true);
}

template <typename O, typename T = Sum<O>>
void sum_blocks(const Problem<O>& p, Partial<T>& part, int64_t first, int64_t last, int64_t k, bool fixed) {
  const bool need_expected_weight = !part.a.empty();
  Block<O> block(p);
  std::vector<T> top, sum(p.tile), threshold(p.B, k ? -INFINITY : INFINITY);
  std::vector<Word<O>> turned(need_expected_weight ? kBlock / p.lanes * p.tile : 0);
  for (int64_t index = first; index < last; ++index) {
    block.load(index, need_expected_weight);
    for (int64_t i0 = 0; i0 < p.B; i0 += p.tile) {
      const Tile<T> tile = block.products(i0, std::min(p.tile, p.B - i0));
      // e / ||w|| must stay finite too: with e <= exp(86 - ln C) it does, up to this; beyond, e <= 1 after a raise
      if (!fixed || block.largest_scale > T(7) * T(p.C)) raise_shift(tile, i0, p, part, top);
      p.kernels.lse(tile,
                    {part.shift.data() + i0, sum.data(), threshold.data() + i0, part.top_values.data() + i0 * k,
                     part.top_ids.data() + i0 * k, k},
                    block.factors());
      for (int64_t i = 0; i < tile.m; ++i) part.sum[i0 + i] += double(sum[i]);
      if (need_expected_weight) add_attention(block, tile.m, turned.data(), part.a.data() + i0 * p.d);
    }
  }
}

// One row of all threads' partial results, in the order of the threads.
template <typename T>
void merge_row(int64_t i, const std::vector<Partial<T>>& parts, int64_t k, int64_t d, T* rest, T* values, int64_t* ids,
               T* a) {
  T shift = T(kNoShift);
  for (const auto& part : parts) shift = std::max(shift, part.shift[i]);
  double sum = 0;
  for (const auto& part : parts) sum += part.sum[i] * double(rescale(part.shift[i], shift));
  *rest = sum == 0 ? -T(INFINITY) : T(double(shift) + std::log(sum));
  std::fill_n(values, k, -T(INFINITY));
  std::fill_n(ids, k, -1);
  for (const auto& part : parts)
    for (int64_t c = i * k; c < (i + 1) * k && part.top_values[c] > values[k - 1]; ++c)
      insert(values, ids, k, part.top_values[c], part.top_ids[c]);
  if (!a) return;
  std::fill_n(a, d, T(0));
  for (const auto& part : parts) {
    const T weight = sum == 0 ? T(0) : T(double(rescale(part.shift[i], shift)) / sum);
    for (int64_t c = 0; c < d; ++c) a[c] += weight * part.a[i * d + c];
  }
}

template <typename O>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Problem<O>& p, int64_t k, bool need_expected_weight) {
  using T = Sum<O>;
  const auto options = p.o.x.options();
  Tensor rest = at::empty({p.given}, options), values = at::empty({p.given, k}, options);
  Tensor ids = at::empty({p.given, k}, options.dtype(at::kLong));
  Tensor a = need_expected_weight ? at::empty({p.given, p.d}, options) : at::empty({0}, options);
  T offset;
  const bool fixed = fixed_offset(p, offset);
  std::vector<Partial<T>> parts(thread_count(p.blocks()));
  share_blocks(p.blocks(), parts.size(), [&](int64_t t, int64_t first, int64_t last) {
    parts[t].reset(p.B, p.d, fixed ? offset : T(kNoShift), k, need_expected_weight);
    sum_blocks(p, parts[t], first, last, k, fixed);
  });
  at::parallel_for(0, p.given, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      merge_row(i, parts, k, p.d, rest.data_ptr<T>() + i, values.data_ptr<T>() + i * k, ids.data_ptr<int64_t>() + i * k,
                need_expected_weight ? a.data_ptr<T>() + i * p.d : nullptr);
  });
  return {rest, values, ids, a};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> nontarget_lse_fwd(const Tensor& x,                    // [B, d]
                                                             const Tensor& w,                    // [C, d]
                                                             const Tensor& y,                    // [B]
                                                             const optional<Tensor>& bias,       // [C]
                                                             const optional<Tensor>& class_ids,  // [n]
                                                             const optional<Tensor>& bend,       // [B, 4]
                                                             bool normalize_weight, int64_t pool, int64_t topk,
                                                             optional<at::ScalarType> compute_dtype,
                                                             bool need_expected_weight,
                                                             const optional<Tensor>& operands,
                                                             const optional<Tensor>& scales) {
  refuse(bend, pool);
  refuse_shadow(operands, scales);
  check_compute(x.scalar_type(), compute_dtype);
  TORCH_CHECK_VALUE(topk >= 0, "topk = ", topk, "; want 0 or more");
  const Operands o = checked(x, w, y, bias, class_ids, normalize_weight);
  return dispatch_operands(x.scalar_type(), compute_dtype,
                           [&](auto t) { return forward(Problem<decltype(t)>(o), topk, need_expected_weight); });
}

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) { m.impl("nontarget_lse_fwd", nontarget_lse_fwd); }

}  // namespace fastmargin
