// nontarget_lse on the CPU, the backward pass. The formulas are in fastmargin/ops/nontarget_lse.py.
//
//   per block of classes: z again;  g = d_rest exp(z - rest), 0 at the targets;  dw = g x;
//   then the targets and the top-k, row by row, and the projection
//
// dx needs no sweep over the classes: dx_i = d_rest_i expected_weight_i + d_target_i w^_y + the top-k terms, and
// expected_weight was summed in the forward pass. With compute_dtype bfloat16 the operands of the products (x, w, g)
// are rounded to it, and nothing else is: z, all sums, the targets and the top-k terms are float32. One parallel
// region; thread t owns a fixed range of blocks, and a block's gradient is complete when its thread leaves it: an
// optimizer step may follow at once, on one block of dw.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../tile.h"
#include "class_blocks.h"
#include "class_update.h"

namespace fastmargin {

namespace {

// Memory for a gradient. Fresh memory faults page by page when first written, which took a fifth of the backward pass;
// with huge pages Linux maps 2 MiB at a time. This is advice only: Linux may ignore it.
template <typename T>
Tensor empty_in_huge_pages(int64_t n, int64_t d, const at::TensorOptions& options) {
  Tensor t = at::empty({n, d}, options);
#ifdef MADV_HUGEPAGE
  const auto page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = uintptr_t(t.data_ptr<T>()) + page - 1;
  const auto first = begin - begin % page, last = uintptr_t(t.data_ptr<T>() + n * d);
  if (last > first + (8 << 20)) madvise(reinterpret_cast<void*>(first), (last - first) / page * page, MADV_HUGEPAGE);
#endif
  return t;
}

// A gradient of one logit that is added on its own: of a row's target, or of one of its k best.
template <typename T>
struct Entry {
  int64_t class_index, row;
  T value;
};

// What the forward pass saved, and the incoming gradients.
struct Saved {
  Tensor rest;              // [B]
  Tensor topk_classes;      // [B, k]
  Tensor expected_weight;   // [B, d], or [0] without dx
  Tensor d_rest, d_target;  // [B]
  optional<Tensor> d_topk;  // [B, k]
};

template <typename T>
std::vector<Entry<T>> entries_by_class(const Tensor& y /* [B] */, const Saved& s) {
  const int64_t k = s.d_topk ? s.topk_classes.size(1) : 0;
  const int64_t *label = y.const_data_ptr<int64_t>(), *id = s.topk_classes.const_data_ptr<int64_t>();
  std::vector<Entry<T>> entries;
  const auto add = [&](int64_t j, int64_t row, T value) {
    if (j >= 0) entries.push_back({j, row, value});
  };
  for (int64_t i = 0; i < y.size(0); ++i) {
    add(label[i], i, s.d_target.const_data_ptr<T>()[i]);
    for (int64_t c = i * k; c < (i + 1) * k; ++c) add(id[c], i, s.d_topk->const_data_ptr<T>()[c]);
  }
  std::sort(entries.begin(), entries.end(), [](const auto& u, const auto& v) {
    return std::tie(u.class_index, u.row) < std::tie(v.class_index, v.row);
  });
  return entries;
}

// The gradient of one block of classes, complete when this returns; dw may be null.
template <typename O, typename T = Sum<O>>
void gradient_block(Block<O>& block, const GradRows<T>& rows, const std::vector<Entry<T>>& entries, T* dw /* [n, d] */,
                    T* sum_g /* [n] */) {
  const Problem<O>& p = block.p;
  std::fill_n(sum_g, block.n, T(0));
  O* g = reinterpret_cast<O*>(block.operand());
  for (int64_t i0 = 0; i0 < p.B; i0 += p.tile) {
    const Tile<T> tile = block.products(i0, std::min(p.tile, p.B - i0));
    p.kernels.gradient(tile, {rows.rest + i0, rows.d_rest + i0}, g, sum_g);
    if (dw) gemm(tile.n, p.d, tile.m, g, tile.m, p.right(i0), p.d, dw, p.d, i0 > 0);
  }
  auto entry = std::lower_bound(entries.begin(), entries.end(), block.first,
                                [](const Entry<T>& e, int64_t first) { return e.class_index < first; });
  for (; entry != entries.end() && entry->class_index < block.first + block.n; ++entry) {
    const int64_t j = entry->class_index - block.first;
    const T* x = p.x + entry->row * p.d;
    sum_g[j] += entry->value;
    if (dw)
      for (int64_t c = 0; c < p.d; ++c) dw[j * p.d + c] += entry->value * x[c];
  }
  if (dw && p.normalize) p.kernels.project(block.w, block.ld, block.n, p.d, block.scale_.data(), dw);
}

// dx_i = d_rest_i expected_weight_i + sum over the target and the top-k of their gradient times the class's unit weight
template <typename O, typename T = Sum<O>>
void backward_rows(const Problem<O>& p, const Saved& s, Tensor& dx /* [B, d] */) {
  const int64_t k = s.d_topk ? s.topk_classes.size(1) : 0;
  const int64_t* id = s.topk_classes.const_data_ptr<int64_t>();
  const T *d_topk = s.d_topk ? s.d_topk->const_data_ptr<T>() : nullptr, *d_target = s.d_target.const_data_ptr<T>();
  at::parallel_for(0, p.unpadded, 16, [&](int64_t begin, int64_t end) {
    std::vector<T> buffer(p.d);
    for (int64_t i = begin; i < end; ++i) {
      T* out = dx.data_ptr<T>() + i * p.d;
      const T *in = s.expected_weight.const_data_ptr<T>() + i * p.d, d_rest = s.d_rest.const_data_ptr<T>()[i];
      for (int64_t c = 0; c < p.d; ++c) out[c] = d_rest * in[c];
      const auto add = [&](int64_t j, T g) {
        if (j < 0) return;
        const T* w = p.w.row(j, buffer.data());
        T scale = 1;
        if (p.normalize) p.kernels.inverse_norms(w, p.d, 1, p.d, &scale);
        for (int64_t c = 0; c < p.d; ++c) out[c] += g * scale * w[c];
      };
      add(p.y[i], d_target[i]);
      for (int64_t c = i * k; c < (i + 1) * k; ++c) add(id[c], d_topk[c]);
    }
  });
}

// GradRows, padded. Where a row has no other class, a huge rest makes its g 0.
template <typename T>
struct PaddedRows {
  std::vector<T> rest, d_rest;
  GradRows<T> rows;

  PaddedRows(const Saved& s, int64_t unpadded, int64_t B)
      : rest(s.rest.const_data_ptr<T>(), s.rest.const_data_ptr<T>() + unpadded),
        d_rest(s.d_rest.const_data_ptr<T>(), s.d_rest.const_data_ptr<T>() + unpadded) {
    std::replace(rest.begin(), rest.end(), -T(INFINITY), -T(kNoShift));
    rest.resize(B, -T(kNoShift));
    d_rest.resize(B, T(0));
    rows = {rest.data(), d_rest.data()};
  }
};

// Calls work(thread, block) for every block of classes.
template <typename O, typename F>
void over_blocks(const Problem<O>& p, const F& work) {
  share_blocks(p.blocks(), thread_count(p.blocks()), [&](int64_t thread, int64_t first, int64_t last) {
    Block<O> block(p);
    for (int64_t index = first; index < last; ++index) {
      block.load(index, false);
      work(thread, block);
    }
  });
}

Tensor or_empty(const Tensor& gradient, const at::TensorOptions& options) {
  return gradient.defined() ? gradient : at::empty({0}, options);
}

// dw is either returned or, with an update, used up by an optimizer step on each block as soon as its gradient is
// complete. dx comes first: it is of the weights before the step.
template <typename O>
std::tuple<Tensor, Tensor, Tensor> backward(const Problem<O>& p, const Saved& s, const ClassUpdate<Sum<O>>* update,
                                            bool need_dx, bool need_dw, bool need_db) {
  using T = Sum<O>;
  const auto options = p.o.x.options();
  Tensor dx, dw, db;
  if (need_dx) backward_rows(p, s, dx = at::empty_like(p.o.x));
  if (need_dw) dw = p.B ? empty_in_huge_pages<T>(p.C, p.d, options) : at::zeros({p.C, p.d}, options);
  if (need_db) db = at::empty({p.C}, options);
  if (update || need_dw || need_db) {
    const PaddedRows<T> padded(s, p.unpadded, p.B);
    const auto entries = entries_by_class<T>(p.o.y, s);
    const Tensor sums = need_db ? db : at::empty({p.C}, options);
    std::vector<std::vector<T>> block_gradients(update ? thread_count(p.blocks()) : 0);
    over_blocks(p, [&](int64_t thread, Block<O>& block) {
      T* out = need_dw ? dw.data_ptr<T>() + block.first * p.d : nullptr;
      if (update) {
        block_gradients[thread].resize(kBlock * p.d);  // zeros, which stay where there are no rows
        out = block_gradients[thread].data();
      }
      gradient_block(block, padded.rows, entries, out, sums.data_ptr<T>() + block.first);
      for (int64_t j = 0; update && j < block.n; ++j) update->step(block.first + j, out + j * p.d);
    });
  }
  return {or_empty(dx, options), or_empty(dw, options), or_empty(db, options)};
}

Saved checked_saved(const Operands& o, const Tensor& rest, const Tensor& topk_classes, const Tensor& expected_weight,
                    const Tensor& d_rest, const Tensor& d_target, const optional<Tensor>& d_topk, bool need_dx) {
  const int64_t B = o.x.size(0), k = topk_classes.dim() == 2 ? topk_classes.size(1) : 0;
  const auto dtype = o.x.scalar_type();
  const Saved saved{checked_like("rest", rest, {B}, dtype),
                    checked_like("topk_classes", topk_classes, {B, k}, at::kLong),
                    need_dx ? checked_like("expected_weight, of a forward pass with need_expected_weight=True,",
                                           expected_weight, o.x.sizes(), dtype)
                            : expected_weight,
                    checked_like("d_rest", d_rest, {B}, dtype),
                    checked_like("d_target", d_target, {B}, dtype),
                    d_topk ? optional(checked_like("d_topk", *d_topk, {B, k}, dtype)) : std::nullopt};
  const int64_t* id = saved.topk_classes.const_data_ptr<int64_t>();
  for (int64_t c = 0; c < B * k; ++c)
    TORCH_CHECK_VALUE(id[c] >= -1 && id[c] < o.classes(), "topk_classes holds ", id[c], ": want [-1, ", o.classes(),
                      ")");
  return saved;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> nontarget_lse_bwd(const Tensor& x,                    // [B, d]
                                                     const Tensor& w,                    // [C, d]
                                                     const Tensor& y,                    // [B]
                                                     const optional<Tensor>& bias,       // [C]
                                                     const optional<Tensor>& class_ids,  // [n]
                                                     const optional<Tensor>& bend,       // [B, 4]
                                                     bool normalize_weight, int64_t pool,
                                                     optional<at::ScalarType> compute_dtype,
                                                     const Tensor& rest,              // [B]
                                                     const Tensor& topk_classes,      // [B, k]
                                                     const Tensor& expected_weight,   // [B, d], or [0] without dx
                                                     const Tensor&,                   // [0]
                                                     const Tensor& d_rest,            // [B]
                                                     const Tensor& d_target,          // [B]
                                                     const optional<Tensor>& d_topk,  // [B, k]
                                                     bool need_dx, bool need_dw, bool need_db) {
  refuse(bend, pool);
  check_compute(x.scalar_type(), compute_dtype);
  const Operands o = checked_values(x, w, y, bias, class_ids, normalize_weight);
  const Saved saved = checked_saved(o, rest, topk_classes, expected_weight, d_rest, d_target, d_topk, need_dx);
  return dispatch_operands(x.scalar_type(), compute_dtype, [&](auto t) {
    return backward(Problem<decltype(t)>(o), saved, nullptr, need_dx, need_dw, need_db);
  });
}

std::tuple<Tensor, Tensor> nontarget_lse_bwd_update(const Tensor& x,                    // [B, d]
                                                    const Tensor& w,                    // [C, d], changed
                                                    const Tensor& y,                    // [B]
                                                    const optional<Tensor>& bias,       // [C]
                                                    const optional<Tensor>& class_ids,  // [n]
                                                    const optional<Tensor>& bend,       // [B, 4]
                                                    bool normalize_weight, int64_t pool,
                                                    optional<at::ScalarType> compute_dtype,
                                                    const Tensor& rest,              // [B]
                                                    const Tensor& topk_classes,      // [B, k]
                                                    const Tensor& expected_weight,   // [B, d], or [0] without dx
                                                    const Tensor&,                   // [0]
                                                    const Tensor& d_rest,            // [B]
                                                    const Tensor& d_target,          // [B]
                                                    const optional<Tensor>& d_topk,  // [B, k]
                                                    bool need_dx, bool need_db,
                                                    at::TensorList state,  // [C, d] each, changed
                                                    c10::string_view rule, at::ArrayRef<double> hyper,
                                                    const optional<Tensor>& grad_scale,  // []
                                                    const optional<Tensor>& operands, const optional<Tensor>& scales) {
  refuse(bend, pool);
  refuse_cached_operands(operands, scales);
  check_compute(x.scalar_type(), compute_dtype);
  const Operands o = checked_values(x, w, y, bias, class_ids, normalize_weight);
  const Saved saved = checked_saved(o, rest, topk_classes, expected_weight, d_rest, d_target, d_topk, need_dx);
  return dispatch_operands(x.scalar_type(), compute_dtype, [&](auto t) {
    using T = Sum<decltype(t)>;
    const ClassUpdate<T> update(w, state, o.class_ids, rule, hyper, grad_scale);
    const auto [dx, dw, db] = backward(Problem<decltype(t)>(o), saved, &update, need_dx, false, need_db);
    return std::tuple(dx, db);
  });
}

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) {
  m.impl("nontarget_lse_bwd", nontarget_lse_bwd);
  m.impl("nontarget_lse_bwd_update", nontarget_lse_bwd_update);
}

}  // namespace fastmargin
