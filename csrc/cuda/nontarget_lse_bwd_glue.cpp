// nontarget_lse on a GPU, the backward pass: checks, allocation, and the loop over chunks of classes.
//
//   per chunk   o and z as in the forward pass;  E;  dx += E o in splits of the chunk;  dw = E^T (c x), then projected
//   kept E      dw alone, as above;  dx is expected_weight, scaled
//
// Matrix products are ATen's, all else is in nontarget_lse_bwd.cu. The host never waits for the device. Beside the
// results, memory is needed for one chunk. Formulas: fastmargin/ops/nontarget_lse.py and exponentials.py. Letters: B
// rows, n classes of a chunk, d, k.
#include <ATen/ops/cat.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>

#include "nontarget_lse_chunks.h"

namespace fastmargin::cuda {
namespace {

// What the forward pass saved, and the incoming gradients, checked.
struct Saved {
  Tensor rest, topk_classes;  // [B], [B, k]
  Tensor expected_weight, e;  // [B, d] and [B, pitch], where exponentials were kept; else [0]
  Tensor d_rest, d_target;    // [B]
  optional<Tensor> d_topk;    // [B, k]

  Upstream raw(const Tensor& x /* [B, d] */) const {
    return {x.const_data_ptr<float>(),
            rest.const_data_ptr<float>(),
            d_rest.const_data_ptr<float>(),
            d_target.const_data_ptr<float>(),
            d_topk ? d_topk->const_data_ptr<float>() : nullptr,
            topk_classes.const_data_ptr<int64_t>(),
            d_topk ? topk_classes.size(1) : 0};
  }
};

Saved checked_saved(const ClassChunks& chunks, const Tensor& rest, const Tensor& topk_classes,
                    const Tensor& expected_weight, const Tensor& exponentials, const Tensor& d_rest,
                    const Tensor& d_target, const optional<Tensor>& d_topk, bool need_dx) {
  const Tensor& x = chunks.in.x;
  const bool kept = exponentials.numel() > 0;
  TORCH_CHECK_VALUE(!kept || exponentials.is_contiguous(), "want exponentials contiguous; got strides ",
                    exponentials.strides());
  const int64_t B = x.size(0), k = topk_classes.dim() == 2 ? topk_classes.size(1) : 0;
  const auto like = [&](const char* name, const Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
    return checked_like(name, t, sizes, type, x.device());
  };
  return {like("rest", rest, {B}, at::kFloat),
          like("topk_classes", topk_classes, {B, k}, at::kLong),
          kept && need_dx ? like("expected_weight", expected_weight, {B, chunks.d}, at::kFloat) : Tensor(),
          kept ? like("exponentials", exponentials, {B, pitch_of(chunks.C)}, chunks.type) : Tensor(),
          like("d_rest", d_rest, {B}, at::kFloat),
          like("d_target", d_target, {B}, at::kFloat),
          d_topk ? optional(like("d_topk", *d_topk, {B, k}, at::kFloat)) : std::nullopt};
}

// d_target and d_topk, sorted by class.
struct SortedEntries {
  Tensor class_index, row, value;  // [m]

  SortedEntries(const Tensor& y, const Saved& s) {
    Tensor classes = y.unsqueeze(1), values = s.d_target.unsqueeze(1), order;
    if (s.d_topk) {
      classes = at::cat({classes, s.topk_classes}, 1);
      values = at::cat({values, *s.d_topk}, 1);
    }
    std::tie(class_index, order) = at::sort(classes.flatten(), /*stable=*/true, 0, false);
    value = values.flatten().index_select(0, order);
    row = at::floor_divide(order, classes.size(1));
  }

  Entries raw() const {
    return {class_index.const_data_ptr<int64_t>(), row.const_data_ptr<int64_t>(), value.const_data_ptr<float>(),
            class_index.size(0)};
  }
};

// RowScales, and c x as an operand.
struct Scales {
  Tensor offset, c, dx_scale, lift;  // [B] each, [1]

  Scales(const ClassChunks& chunks, const Upstream& u, bool kept) {
    const auto options = chunks.in.x.options();
    for (Tensor* t : {&offset, &c, &dx_scale}) *t = at::empty({chunks.B}, options);
    lift = at::empty({1}, options);
    const float o = kept_offset(chunks.C);
    const RowScales raw{offset.data_ptr<float>(), c.data_ptr<float>(), dx_scale.data_ptr<float>(),
                        lift.data_ptr<float>()};
    check(launch_row_scales(operand_type(chunks.type), u, chunks.B, kept ? &o : nullptr, raw, chunks.stream));
  }

  Tensor rows(const ClassChunks& chunks) const {  // [B, d], rounded once
    return c.unsqueeze(1).mul(chunks.in.x).to(chunks.type);
  }
};

// dx, dw and db; those that are not needed are undefined. dw holds all classes, or one chunk after the other.
struct Gradients {
  at::TensorOptions options;
  Tensor dx, dw, db;  // [B, d], [C, d] or [step, d], [C]

  Gradients(const ClassChunks& chunks, bool need_dx, optional<int64_t> classes, bool need_db)
      : options(chunks.in.x.options()) {
    if (need_dx) dx = at::empty({chunks.B, chunks.d}, options);
    if (classes) dw = chunks.B ? at::empty({*classes, chunks.d}, options) : at::zeros({*classes, chunks.d}, options);
    if (need_db) db = at::zeros({chunks.C}, options);
  }

  Tensor or_empty(const Tensor& t) const { return t.defined() ? t : at::empty({0}, options); }
};

// What every chunk of classes needs.
struct Pass {
  const ClassChunks& chunks;
  const Saved& saved;
  const Gradients& out;
  Upstream u;
  SortedEntries entries;
  Scales scales;
  Tensor rows;       // [B, d] c x
  Tensor splits;     // [s, B, d]
  Tensor z, buffer;  // [B step] each, where E is made again

  Pass(const ClassChunks& all, const Saved& given, const Gradients& gradients)
      : chunks(all),
        saved(given),
        out(gradients),
        u(given.raw(all.in.x)),
        entries(all.in.y, given),
        scales(all, u, given.e.defined()),
        rows(gradients.dw.defined() ? scales.rows(all) : Tensor()) {
    if (saved.e.defined()) return;
    const auto options = all.in.x.options();
    splits = at::zeros({out.dx.defined() ? splits_of(all.B, all.d) : 0, all.B, all.d}, options);
    z = all.workspace();
    buffer = all.type == at::kFloat ? z : at::empty({all.B * all.step}, options.dtype(all.type));
  }

  Tensor exponentials(const Classes& c) const {  // [B, n]
    if (saved.e.defined()) return saved.e.narrow(1, c.first, c.n);
    const Logits products = chunks.products(c, z);
    check(launch_nontarget_lse_bwd(operand_type(chunks.type), products, c, scales.offset.const_data_ptr<float>(),
                                   buffer.data_ptr(), chunks.stream));
    return chunks.matrix(buffer, c);
  }

  // The gradients of one chunk of classes: adds to splits; dw and db are complete.
  void add_chunk(const Classes& c, const Tensor& dw /* [n, d] or undefined */) const {
    const Tensor e = exponentials(c);
    if (splits.defined() && out.dx.defined()) add_row_products(splits, e, chunks.operands(c));
    if (dw.defined()) device::multiply(dw, e.t(), rows);
    const Tensor db = out.db.defined() ? out.db.narrow(0, c.first, c.n) : Tensor();
    if (db.defined()) device::multiply(db.unsqueeze(0), scales.c.to(chunks.type).unsqueeze(0), e);
    if (!dw.defined() && !db.defined()) return;
    check(launch_weight_gradient(operand_type(chunks.type), c, u, entries.raw(), scales.lift.const_data_ptr<float>(),
                                 dw.defined() ? dw.data_ptr<float>() : nullptr,
                                 db.defined() ? db.data_ptr<float>() : nullptr, chunks.stream));
  }

  // What the other classes give to dx; the targets and the top-k are there.
  void add_rest() const {
    const bool kept = saved.e.defined();
    const Tensor& parts = kept ? saved.expected_weight : splits;
    const Tensor& scale = kept ? saved.d_rest : scales.dx_scale;
    check(launch_add_splits(parts.const_data_ptr<float>(), kept ? 1 : splits.size(0), chunks.B, chunks.d,
                            scale.const_data_ptr<float>(), out.dx.data_ptr<float>(), chunks.stream));
  }
};

// The whole backward pass; calls take(c, dw) after every chunk with the gradient of its classes.
template <typename F>
void sweep(const ClassChunks& chunks, const Saved& saved, const Gradients& out, const F& take) {
  const Pass pass(chunks, saved, out);
  if (out.dx.defined())  // targets and top-k first: `take` may change the weights
    check(launch_row_gradient(classes_of(chunks.in, nullptr, 0, 0), pass.u, chunks.in.y.const_data_ptr<int64_t>(),
                              chunks.B, out.dx.data_ptr<float>(), chunks.stream));
  const bool all = out.dw.defined() && out.dw.size(0) == chunks.C, idle = saved.e.defined() && !out.dw.defined();
  for (int64_t first = 0; first < chunks.C && !idle; first += chunks.step) {
    const Classes c = chunks.classes(first);
    const Tensor dw = out.dw.defined() ? out.dw.narrow(0, all ? first : 0, c.n) : Tensor();
    pass.add_chunk(c, dw);
    take(c, dw);
  }
  if (out.dx.defined()) pass.add_rest();
}

// Of a chunk of the backward pass: products and seconds of the host, as most_classes wants them.
int64_t products_of(bool kept, bool need_dx, bool need_dw) { return kept ? 1 : 1 + need_dx + need_dw; }
double seconds_of(bool kept, bool need_dx, bool need_dw, bool steps) {
  const int launches = (kept ? 0 : 2) + need_dw + steps;
  return launches * kLaunch + products_of(kept, need_dx, need_dw) * kProduct;
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
                                                     const Tensor& expected_weight,   // [B, d] or [0]
                                                     const Tensor& exponentials,      // [B, pitch] or [0]
                                                     const Tensor& d_rest,            // [B]
                                                     const Tensor& d_target,          // [B]
                                                     const optional<Tensor>& d_topk,  // [B, k]
                                                     bool need_dx, bool need_dw, bool need_db) {
  const Operands in = checked_layout(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  const c10::DeviceGuard guard(x.device());
  const bool kept = exponentials.numel() > 0;
  const ClassChunks chunks(in, compute_dtype, products_of(kept, need_dx, need_dw),
                           seconds_of(kept, need_dx, need_dw, false));
  const Saved saved =
      checked_saved(chunks, rest, topk_classes, expected_weight, exponentials, d_rest, d_target, d_topk, need_dx);
  const Gradients out(chunks, need_dx, need_dw ? optional(chunks.C) : std::nullopt, need_db);
  if (chunks.B) sweep(chunks, saved, out, [](const Classes&, const Tensor&) {});
  return {out.or_empty(out.dx), out.or_empty(out.dw), out.or_empty(out.db)};
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
                                                    const Tensor& expected_weight,   // [B, d] or [0]
                                                    const Tensor& exponentials,      // [B, pitch] or [0]
                                                    const Tensor& d_rest,            // [B]
                                                    const Tensor& d_target,          // [B]
                                                    const optional<Tensor>& d_topk,  // [B, k]
                                                    bool need_dx, bool need_db,
                                                    at::TensorList state,  // [C, d] each, changed
                                                    std::string_view rule, at::ArrayRef<double> hyper,
                                                    const optional<Tensor>& grad_scale,  // []
                                                    const optional<Tensor>& operands,    // [C, d], changed
                                                    const optional<Tensor>& scales /* [2, C], changed */) {
  const Operands in = checked_layout(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  const c10::DeviceGuard guard(x.device());
  const bool kept = exponentials.numel() > 0;
  const ClassChunks chunks(in, compute_dtype, products_of(kept, need_dx, true), seconds_of(kept, need_dx, true, true),
                           operands, scales);
  const Saved saved =
      checked_saved(chunks, rest, topk_classes, expected_weight, exponentials, d_rest, d_target, d_topk, need_dx);
  const Gradients out(chunks, need_dx, chunks.step, need_db);
  const ClassStep step(w, state, in.class_ids, rule, hyper, grad_scale, chunks.cache, chunks.stream);
  if (chunks.B) {
    sweep(chunks, saved, out,
          [&](const Classes& c, const Tensor& dw) { step.make(dw.const_data_ptr<float>(), c.first, c.n); });
  } else {
    for (int64_t first = 0; first < chunks.C; first += chunks.step)
      step.make(out.dw.const_data_ptr<float>(), first, std::min(chunks.step, chunks.C - first));
  }
  return {out.or_empty(out.dx), out.or_empty(out.db)};
}

}  // namespace fastmargin::cuda
