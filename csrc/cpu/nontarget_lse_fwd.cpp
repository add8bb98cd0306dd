// nontarget_lse on the CPU, the forward pass. The formulas are in fastmargin/ops/nontarget_lse.py.
//
//   per block of classes: z = w x^T;  e = exp(z - shift), summed and searched for the k best;  expected_weight += e^T w
//
// expected_weight_i = sum_{j != y_i} exp(z_ij - rest_i) w_j / ||w_j|| is what dx needs of the other classes: the
// backward pass (nontarget_lse_bwd.cpp) does not sweep over the classes again for dx. With compute_dtype bfloat16 the
// operands of the products (x, w, e) are rounded to it, and nothing else is: z and all sums are float32. There is one
// parallel region. Thread t owns a fixed range of blocks and private sums, which are merged in the order of t, so the
// result depends on the thread count and on nothing else. Tiles are kBlock classes x kRowTile rows.
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
// neither overflows nor underflows while ||x|| <= 86 - o (float32; the exponent range of float64 allows 700). bfloat16
// products flush numbers below 1e-38 to 0: exp(-76) leaves room for the weight that it is multiplied by. Rounding x and
// w makes |z| larger by a factor of 1 + 2^-8 at most: there is room for that, too.
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
  std::vector<T> shift, topk_values, expected_weight;
  std::vector<double> sum;
  std::vector<int64_t> topk_classes;

  void reset(int64_t B, int64_t d, T start, int64_t k, bool need_expected_weight) {
    shift.assign(B, start);
    sum.assign(B, 0.0);
    topk_values.assign(B * k, -INFINITY);
    topk_classes.assign(B * k, -1);
    if (need_expected_weight) expected_weight.assign(B * d, T(0));
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
    if (!part.expected_weight.empty())
      for (int64_t c = 0; c < p.d; ++c) part.expected_weight[row * p.d + c] *= factor;
    part.shift[row] = top[i];
  }
}

// expected_weight += e^T w
template <typename O, typename T = Sum<O>>
void add_expected_weight(Block<O>& block, int64_t m, Word<O>* transposed /* [m, n / lanes] */,
                         T* expected_weight /* [m, d] */) {
  const Problem<O>& p = block.p;
  const int64_t words = at::divup(block.n, p.lanes), n = words * p.lanes;
  p.kernels.transpose(block.operand(), words, m, transposed);
  gemm(m, p.d, n, reinterpret_cast<const O*>(transposed), n, block.w_operand.right, block.w_operand.ld_right,
       expected_weight, p.d, true);
}

template <typename O, typename T = Sum<O>>
void sum_blocks(const Problem<O>& p, Partial<T>& part, int64_t first, int64_t last, int64_t k, bool fixed) {
  const bool need_expected_weight = !part.expected_weight.empty();
  Block<O> block(p);
  std::vector<T> top, sum(p.tile), threshold(p.B, k ? -INFINITY : INFINITY);
  std::vector<Word<O>> transposed(need_expected_weight ? kBlock / p.lanes * p.tile : 0);
  for (int64_t index = first; index < last; ++index) {
    block.load(index, need_expected_weight);
    for (int64_t i0 = 0; i0 < p.B; i0 += p.tile) {
      const Tile<T> tile = block.products(i0, std::min(p.tile, p.B - i0));
      // exp(z - shift) / ||w|| must stay finite, too. With the fixed offset the exponential is at most exp(86) / C, so
      // it does for 1 / ||w|| <= 7 C. For shorter weights the shift is raised, and the exponential is at most 1.
      if (!fixed || block.largest_scale > T(7) * T(p.C)) raise_shift(tile, i0, p, part, top);
      p.kernels.lse(tile,
                    {part.shift.data() + i0, sum.data(), threshold.data() + i0, part.topk_values.data() + i0 * k,
                     part.topk_classes.data() + i0 * k, k},
                    block.operand());
      for (int64_t i = 0; i < tile.m; ++i) part.sum[i0 + i] += double(sum[i]);
      if (need_expected_weight)
        add_expected_weight(block, tile.m, transposed.data(), part.expected_weight.data() + i0 * p.d);
    }
  }
}

// One row of all threads' partial results, in the order of the threads.
template <typename T>
void merge_row(int64_t i, const std::vector<Partial<T>>& parts, int64_t k, int64_t d, T* rest, T* values,
               int64_t* classes, T* expected_weight) {
  T shift = T(kNoShift);
  for (const auto& part : parts) shift = std::max(shift, part.shift[i]);
  double sum = 0;
  for (const auto& part : parts) sum += part.sum[i] * double(rescale(part.shift[i], shift));
  *rest = sum == 0 ? -T(INFINITY) : T(double(shift) + std::log(sum));
  std::fill_n(values, k, -T(INFINITY));
  std::fill_n(classes, k, -1);
  for (const auto& part : parts)
    for (int64_t c = i * k; c < (i + 1) * k && part.topk_values[c] > values[k - 1]; ++c)
      insert(values, classes, k, part.topk_values[c], part.topk_classes[c]);
  if (!expected_weight) return;
  std::fill_n(expected_weight, d, T(0));
  for (const auto& part : parts) {
    const T weight = sum == 0 ? T(0) : T(double(rescale(part.shift[i], shift)) / sum);
    for (int64_t c = 0; c < d; ++c) expected_weight[c] += weight * part.expected_weight[i * d + c];
  }
}

template <typename O>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(const Problem<O>& p, int64_t k, bool need_expected_weight) {
  using T = Sum<O>;
  const auto options = p.o.x.options();
  Tensor rest = at::empty({p.unpadded}, options), values = at::empty({p.unpadded, k}, options);
  Tensor classes = at::empty({p.unpadded, k}, options.dtype(at::kLong));
  Tensor expected_weight = need_expected_weight ? at::empty({p.unpadded, p.d}, options) : at::empty({0}, options);
  T offset;
  const bool fixed = fixed_offset(p, offset);
  std::vector<Partial<T>> parts(thread_count(p.blocks()));
  share_blocks(p.blocks(), parts.size(), [&](int64_t t, int64_t first, int64_t last) {
    parts[t].reset(p.B, p.d, fixed ? offset : T(kNoShift), k, need_expected_weight);
    sum_blocks(p, parts[t], first, last, k, fixed);
  });
  at::parallel_for(0, p.unpadded, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      merge_row(i, parts, k, p.d, rest.data_ptr<T>() + i, values.data_ptr<T>() + i * k,
                classes.data_ptr<int64_t>() + i * k,
                need_expected_weight ? expected_weight.data_ptr<T>() + i * p.d : nullptr);
  });
  return {rest, values, classes, expected_weight, at::empty({0}, options)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nontarget_lse_fwd(const Tensor& x,                    // [B, d]
                                                                     const Tensor& w,                    // [C, d]
                                                                     const Tensor& y,                    // [B]
                                                                     const optional<Tensor>& bias,       // [C]
                                                                     const optional<Tensor>& class_ids,  // [n]
                                                                     const optional<Tensor>& bend,       // [B, 4]
                                                                     bool normalize_weight, int64_t pool, int64_t topk,
                                                                     optional<at::ScalarType> compute_dtype,
                                                                     bool need_expected_weight,
                                                                     const optional<Tensor>& operands,
                                                                     const optional<Tensor>& scales,
                                                                     bool keep_exponentials) {
  refuse(bend, pool);
  refuse_cached_operands(operands, scales);
  check_compute(x.scalar_type(), compute_dtype);
  TORCH_CHECK_VALUE(topk >= 0, "topk = ", topk, "; want 0 or more");
  TORCH_CHECK_VALUE(!keep_exponentials, "these kernels keep no exponentials");
  const Operands o = checked_values(x, w, y, bias, class_ids, normalize_weight);
  return dispatch_operands(x.scalar_type(), compute_dtype,
                           [&](auto t) { return forward(Problem<decltype(t)>(o), topk, need_expected_weight); });
}

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) { m.impl("nontarget_lse_fwd", nontarget_lse_fwd); }

}  // namespace fastmargin
