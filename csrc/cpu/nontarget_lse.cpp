// nontarget_lse on the CPU. The formulas are in fastmargin/ops/nontarget_lse.py.
//
//   forward   per block of classes: z = w x^T;  e = exp(z - shift), summed and searched for the k best;  a += e^T w
//   backward  per block of classes: z again;  g = d_rest exp(z - rest), 0 at the targets;  dw = g x;
//             then the targets and the top-k, row by row, and the projection
//
// dx needs no sweep: dx_i = d_rest_i a_i + d_target_i w_y + the top-k terms, and a was summed in the forward pass.
// With compute_dtype bfloat16 the operands of the products (x, w, e, g) are rounded to it, and nothing else is: z, all
// sums, the targets and the top-k terms are float32.
// One parallel region each. Thread t owns a fixed range of blocks and private sums, merged in the order of t, so the
// result depends on the thread count and on nothing else. Tiles are kBlock classes x kRowTile rows.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../tile.h"
#include "capability.h"
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

  void reset(int64_t B, int64_t d, T start, int64_t k, bool want_a) {
    shift.assign(B, start);
    sum.assign(B, 0.0);
    top_values.assign(B * k, -INFINITY);
    top_ids.assign(B * k, -1);
    if (want_a) a.assign(B * d, T(0));
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
  const bool want_a = !part.a.empty();
  Block<O> block(p);
  std::vector<T> top, sum(p.tile), threshold(p.B, k ? -INFINITY : INFINITY);
  std::vector<Word<O>> turned(want_a ? kBlock / p.lanes * p.tile : 0);
  for (int64_t index = first; index < last; ++index) {
    block.load(index, want_a);
    for (int64_t i0 = 0; i0 < p.B; i0 += p.tile) {
      const Tile<T> tile = block.products(i0, std::min(p.tile, p.B - i0));
      // e / ||w|| must stay finite too: with e <= exp(86 - ln C) it does, up to this; beyond, e <= 1 after a raise
      if (!fixed || block.largest_scale > T(7) * T(p.C)) raise_shift(tile, i0, p, part, top);
      p.kernels.lse(tile,
                    {part.shift.data() + i0, sum.data(), threshold.data() + i0, part.top_values.data() + i0 * k,
                     part.top_ids.data() + i0 * k, k},
                    block.factors());
      for (int64_t i = 0; i < tile.m; ++i) part.sum[i0 + i] += double(sum[i]);
      if (want_a) add_attention(block, tile.m, turned.data(), part.a.data() + i0 * p.d);
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
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Problem<O>& p, int64_t k, bool want_a) {
  using T = Sum<O>;
  const auto options = p.o.x.options();
  Tensor rest = at::empty({p.given}, options), values = at::empty({p.given, k}, options);
  Tensor ids = at::empty({p.given, k}, options.dtype(at::kLong));
  Tensor a = want_a ? at::empty({p.given, p.d}, options) : at::empty({0}, options);
  T offset;
  const bool fixed = fixed_offset(p, offset);
  std::vector<Partial<T>> parts(thread_count(p.blocks()));
  share_blocks(p.blocks(), parts.size(), [&](int64_t t, int64_t first, int64_t last) {
    parts[t].reset(p.B, p.d, fixed ? offset : T(kNoShift), k, want_a);
    sum_blocks(p, parts[t], first, last, k, fixed);
  });
  at::parallel_for(0, p.given, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      merge_row(i, parts, k, p.d, rest.data_ptr<T>() + i, values.data_ptr<T>() + i * k, ids.data_ptr<int64_t>() + i * k,
                want_a ? a.data_ptr<T>() + i * p.d : nullptr);
  });
  return {rest, values, ids, a};
}

// Room for a gradient. Memory of many megabytes comes as pages that fault one by one when first written, a fifth of the
// backward pass; in huge pages the kernel hands out 2 MiB at a time. Advice only: what it cannot follow it ignores.
template <typename T>
Tensor fresh(int64_t n, int64_t d, const at::TensorOptions& options) {
  Tensor t = at::empty({n, d}, options);
#ifdef MADV_HUGEPAGE
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = uintptr_t(t.data_ptr<T>()) + page - 1;
  const auto first = begin - begin % page, last = uintptr_t(t.data_ptr<T>() + n * d);
  if (last > first + (8 << 20)) madvise(reinterpret_cast<void*>(first), (last - first) / page * page, MADV_HUGEPAGE);
#endif
  return t;
}

// One row's gradient at one class, apart from the sum over all: of its target, or of one of its k best.
template <typename T>
struct Entry {
  int64_t id, row;
  T value;
};

// What the forward pass left and what came from above.
struct Saved {
  Tensor rest;              // [B]
  Tensor ids;               // [B, k]
  Tensor a;                 // [B, d], or [0] without dx
  Tensor d_rest, d_target;  // [B]
  optional<Tensor> d_topk;  // [B, k]
};

template <typename T>
std::vector<Entry<T>> entries_by_class(const Tensor& y /* [B] */, const Saved& s) {
  const int64_t k = s.d_topk ? s.ids.size(1) : 0;
  const int64_t *label = y.const_data_ptr<int64_t>(), *id = s.ids.const_data_ptr<int64_t>();
  std::vector<Entry<T>> entries;
  const auto add = [&](int64_t j, int64_t row, T value) {
    if (j >= 0) entries.push_back({j, row, value});
  };
  for (int64_t i = 0; i < y.size(0); ++i) {
    add(label[i], i, s.d_target.const_data_ptr<T>()[i]);
    for (int64_t c = i * k; c < (i + 1) * k; ++c) add(id[c], i, s.d_topk->const_data_ptr<T>()[c]);
  }
  std::sort(entries.begin(), entries.end(),
            [](const auto& u, const auto& v) { return std::tie(u.id, u.row) < std::tie(v.id, v.row); });
  return entries;
}

template <typename T>
struct Gradients {
  Tensor dx, dw, db;  // [B, d], [C, d], [C], each undefined where not asked for
  std::vector<Entry<T>> entries;
};

// dw and db of one block, complete when this returns.
template <typename O, typename T = Sum<O>>
void gradient_block(Block<O>& block, const GradRows<T>& rows, std::vector<T>& sum_g, Gradients<T>& out) {
  const Problem<O>& p = block.p;
  std::fill(sum_g.begin(), sum_g.end(), T(0));
  T* dw = out.dw.defined() ? out.dw.template data_ptr<T>() + block.first * p.d : nullptr;
  O* g = reinterpret_cast<O*>(block.factors());
  for (int64_t i0 = 0; i0 < p.B; i0 += p.tile) {
    const Tile<T> tile = block.products(i0, std::min(p.tile, p.B - i0));
    p.kernels.gradient(tile, {rows.rest + i0, rows.d_rest + i0}, g, sum_g.data());
    if (dw) gemm(tile.n, p.d, tile.m, g, tile.m, p.lines(i0), p.d, dw, p.d, i0 > 0);
  }
  auto entry = std::lower_bound(out.entries.begin(), out.entries.end(), block.first,
                                [](const Entry<T>& e, int64_t id) { return e.id < id; });
  for (; entry != out.entries.end() && entry->id < block.first + block.n; ++entry) {
    const int64_t j = entry->id - block.first;
    const T* x = p.x + entry->row * p.d;
    sum_g[j] += entry->value;
    if (dw)
      for (int64_t c = 0; c < p.d; ++c) dw[j * p.d + c] += entry->value * x[c];
  }
  if (dw && p.normalize) p.kernels.project(block.w, block.ld, block.n, p.d, block.scale_.data(), dw);
  if (out.db.defined()) std::copy_n(sum_g.data(), block.n, out.db.template data_ptr<T>() + block.first);
}

template <typename O, typename T = Sum<O>>
void backward_classes(const Problem<O>& p, const GradRows<T>& rows, Gradients<T>& out) {
  share_blocks(p.blocks(), thread_count(p.blocks()), [&](int64_t, int64_t first, int64_t last) {
    Block<O> block(p);
    std::vector<T> sum_g(kBlock);
    for (int64_t index = first; index < last; ++index) {
      block.load(index, false);
      gradient_block(block, rows, sum_g, out);
    }
  });
}

// dx_i = d_rest_i a_i + sum over (target, the top-k) of their gradient times the class's unit weight
template <typename O, typename T = Sum<O>>
void backward_rows(const Problem<O>& p, const Saved& s, Tensor& dx /* [B, d] */) {
  const int64_t k = s.d_topk ? s.ids.size(1) : 0;
  const int64_t* id = s.ids.const_data_ptr<int64_t>();
  const T *top = s.d_topk ? s.d_topk->const_data_ptr<T>() : nullptr, *d_target = s.d_target.const_data_ptr<T>();
  at::parallel_for(0, p.given, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(p.d);
    for (int64_t i = begin; i < end; ++i) {
      T* out = dx.data_ptr<T>() + i * p.d;
      const T *in = s.a.const_data_ptr<T>() + i * p.d, d_rest = s.d_rest.const_data_ptr<T>()[i];
      for (int64_t c = 0; c < p.d; ++c) out[c] = d_rest * in[c];
      const auto add = [&](int64_t j, T g) {
        if (j < 0) return;
        const T* w = p.w.row(j, buffer.data());
        T scale = 1;
        if (p.normalize) p.kernels.inverse_norms(w, p.d, 1, p.d, &scale);
        for (int64_t c = 0; c < p.d; ++c) out[c] += g * scale * w[c];
      };
      add(p.y[i], d_target[i]);
      for (int64_t c = i * k; c < (i + 1) * k; ++c) add(id[c], top[c]);
    }
  });
}

template <typename O>
std::tuple<Tensor, Tensor, Tensor> backward(const Problem<O>& p, const Saved& s, bool need_dx, bool need_dw,
                                            bool need_db) {
  using T = Sum<O>;
  // Where there is no other class, a rest of +huge makes every g of the row 0.
  std::vector<T> rest(s.rest.const_data_ptr<T>(), s.rest.const_data_ptr<T>() + p.given);
  std::replace(rest.begin(), rest.end(), -T(INFINITY), -T(kNoShift));
  rest.resize(p.B, -T(kNoShift));
  const Tensor d_rest = padded(s.d_rest, p.B, 0);
  const auto options = p.o.x.options();
  Gradients<T> out;
  if (need_dx) backward_rows(p, s, out.dx = at::empty_like(p.o.x));
  if (need_dw) out.dw = p.B ? fresh<T>(p.C, p.d, options) : at::zeros({p.C, p.d}, options);
  if (need_db) out.db = at::empty({p.C}, options);
  if (need_dw || need_db) {
    out.entries = entries_by_class<T>(p.o.y, s);
    backward_classes<O>(p, {rest.data(), d_rest.const_data_ptr<T>()}, out);
  }
  const auto given = [&](const Tensor& g) { return g.defined() ? g : at::empty({0}, options); };
  return {given(out.dx), given(out.dw), given(out.db)};
}

void check_compute(at::ScalarType dtype, const optional<at::ScalarType>& compute_dtype) {
  TORCH_CHECK_VALUE(
      !compute_dtype || (*compute_dtype == at::kBFloat16 && dtype == at::kFloat && cpu_computes_bfloat16()),
      "compute_dtype ", *compute_dtype, " of ", dtype, " operands is not supported on this machine");
}

// Calls f with a value of the operands' type.
template <typename F>
auto dispatch_operands(at::ScalarType dtype, const optional<at::ScalarType>& compute_dtype, const F& f) {
  if (compute_dtype) return f(Bf16());
  return dispatch(dtype, f);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> nontarget_lse_fwd(const Tensor& x,               // [B, d]
                                                             const Tensor& w,               // [C, d]
                                                             const Tensor& y,               // [B]
                                                             const optional<Tensor>& bias,  // [C]
                                                             const optional<Tensor>& rows,  // [n]
                                                             const optional<Tensor>& bend,  // [B, 4]
                                                             bool normalize_weight, int64_t pool, int64_t topk,
                                                             optional<at::ScalarType> compute_dtype, bool want_a) {
  refuse(bend, pool);
  check_compute(x.scalar_type(), compute_dtype);
  TORCH_CHECK_VALUE(topk >= 0, "topk = ", topk, "; want 0 or more");
  const Operands o = checked(x, w, y, bias, rows, normalize_weight);
  return dispatch_operands(x.scalar_type(), compute_dtype,
                           [&](auto t) { return forward(Problem<decltype(t)>(o), topk, want_a); });
}

std::tuple<Tensor, Tensor, Tensor> nontarget_lse_bwd(const Tensor& x,               // [B, d]
                                                     const Tensor& w,               // [C, d]
                                                     const Tensor& y,               // [B]
                                                     const optional<Tensor>& bias,  // [C]
                                                     const optional<Tensor>& rows,  // [n]
                                                     const optional<Tensor>& bend,  // [B, 4]
                                                     bool normalize_weight, int64_t pool,
                                                     optional<at::ScalarType> compute_dtype,
                                                     const Tensor& rest,              // [B]
                                                     const Tensor& topk_classes,      // [B, k]
                                                     const Tensor& a,                 // [B, d], or [0] without dx
                                                     const Tensor& d_rest,            // [B]
                                                     const Tensor& d_target,          // [B]
                                                     const optional<Tensor>& d_topk,  // [B, k]
                                                     bool need_dx, bool need_dw, bool need_db) {
  refuse(bend, pool);
  check_compute(x.scalar_type(), compute_dtype);
  const Operands o = checked(x, w, y, bias, rows, normalize_weight);
  const int64_t B = x.size(0), k = topk_classes.dim() == 2 ? topk_classes.size(1) : 0;
  const auto dtype = x.scalar_type();
  const Saved saved{checked_like("rest", rest, {B}, dtype),
                    checked_like("topk_classes", topk_classes, {B, k}, at::kLong),
                    need_dx ? checked_like("a, of a forward pass with want_a=True,", a, x.sizes(), dtype) : a,
                    checked_like("d_rest", d_rest, {B}, dtype),
                    checked_like("d_target", d_target, {B}, dtype),
                    d_topk ? optional(checked_like("d_topk", *d_topk, {B, k}, dtype)) : std::nullopt};
  const int64_t* id = saved.ids.const_data_ptr<int64_t>();
  for (int64_t c = 0; c < B * k; ++c)
    TORCH_CHECK_VALUE(id[c] >= -1 && id[c] < o.classes(), "topk_classes holds ", id[c], ": want [-1, ", o.classes(),
                      ")");
  return dispatch_operands(dtype, compute_dtype,
                           [&](auto t) { return backward(Problem<decltype(t)>(o), saved, need_dx, need_dw, need_db); });
}

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) {
  m.impl("nontarget_lse_fwd", nontarget_lse_fwd);
  m.impl("nontarget_lse_bwd", nontarget_lse_bwd);
}

}  // namespace fastmargin
