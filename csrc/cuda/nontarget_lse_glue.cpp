// nontarget_lse on a GPU: checks, allocation, and the loop over chunks of classes whose logits stay in the L2 cache.
//
//   forward   o = operands of the chunk, made now or taken from the cache;  z = x o^T;  sums and the k best, row by row
//   backward  o and z again;  g, for both products;  dx += g o in splits of the chunk;  dw = g^T x, then projected
//
// Matrix products are ATen's, all else is in nontarget_lse.cu. The host never waits for the device, so a CUDA graph can
// be captured. Beside the results, memory is needed for one chunk: 256 classes at least. Formulas:
// fastmargin/ops/nontarget_lse.py. Letters: B rows, n classes of a chunk, d, k.
#include <ATen/ops/cat.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/ldexp.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "../check.h"
#include "../tile.h"
#include "class_step.h"
#include "device.h"
#include "launch.h"
#include "ops.h"

namespace fastmargin::cuda {
namespace {

constexpr int64_t kMostClasses = 1 << 14;               // of a chunk: blocks of few long rows leave a GPU idle
constexpr int64_t kMaxScaleExponent = 100;              // of d_rest_scale: a float32 ends at 2^127
constexpr int64_t kTileRows = 128, kTileColumns = 256;  // of a product's tile, about
constexpr int64_t kMostSplits = 8;

void check_types(at::ScalarType dtype, const optional<at::ScalarType>& compute) {
  TORCH_CHECK_VALUE(dtype == at::kFloat, "want float32 on a GPU; got ", dtype);
  TORCH_CHECK_VALUE(!compute || *compute == at::kBFloat16 || *compute == at::kHalf,
                    "want compute_dtype bfloat16 or float16; got ", *compute);
}

// The weights with one chunk of classes; first and n are 0, and count null, for kernels that access single classes.
Classes classes_of(const Operands& in, const int64_t* count, int64_t first, int64_t n) {
  return {in.w.const_data_ptr<float>(),
          in.w.stride(0),
          in.w.stride(1),
          in.bias ? in.bias->const_data_ptr<float>() : nullptr,
          in.class_ids ? in.class_ids->const_data_ptr<int64_t>() : nullptr,
          count,
          in.classes(),
          in.x.size(1),
          in.normalize_weight,
          first,
          n};
}

// What both passes iterate over: the inputs, cut into chunks of classes, and the buffers for one chunk.
struct ClassChunks {
  Operands in;
  Tensor count;           // [] of class_ids without the -1 at their end; undefined without class_ids
  at::ScalarType type;    // of the products' operands
  int64_t B, d, C, step;  // rows, features, classes, classes of a chunk
  Tensor x, z;            // [B, d], [B step]
  // [step, d], [step], [step]; or the cache's, of all classes
  Tensor o, exponent_scale, residual_scale;
  void* stream;
  OperandCache cache;

  ClassChunks(const Operands& given, const optional<at::ScalarType>& compute, const optional<Tensor>& operands = {},
              const optional<Tensor>& scales = {})
      : in(given),
        count(in.class_ids ? at::sum(at::ge(*in.class_ids, 0), at::kLong) : Tensor()),
        type(compute.value_or(at::kFloat)),
        B(in.x.size(0)),
        d(in.x.size(1)),
        C(in.classes()),
        step(std::min(
            C, std::clamp<int64_t>(kChunkBytes / 4 / std::max({B, d, int64_t(1)}) / 64 * 64, 256, kMostClasses))),
        x(in.x.to(type)),
        stream(device::stream_of(in.x)),
        cache(operand_cache_of(in.w, in.normalize_weight, type, operands, scales)) {
    TORCH_CHECK_VALUE(!operands || !in.class_ids, "want the operands of all classes, or class_ids, not both");
    const auto options = in.x.options();
    z = at::empty({B * step}, options);
    if (operands) {
      o = *operands;
      exponent_scale = scales->select(0, 0);
      residual_scale = scales->select(0, 1);
      return;
    }
    if (type != at::kFloat || in.class_ids || in.w.stride(1) != 1) o = at::empty({step, d}, options.dtype(type));
    exponent_scale = at::empty({step}, options);
    residual_scale = at::empty({step}, options);
  }

  Classes classes(int64_t first) const {
    return classes_of(in, count.defined() ? count.const_data_ptr<int64_t>() : nullptr, first,
                      std::min(step, C - first));
  }

  // Where a chunk's operands and scales begin in o and the scales.
  int64_t begin(const Classes& c) const { return cache.o ? c.first : 0; }

  Tensor operands(const Classes& c) const {
    return o.defined() ? o.narrow(0, begin(c), c.n) : in.w.narrow(0, c.first, c.n);
  }

  // A buffer as the matrix of a chunk's logits.
  Tensor matrix(const Tensor& t, const Classes& c) const { return t.narrow(0, 0, B * c.n).view({B, c.n}); }

  // z of a chunk.
  Logits products(const Classes& c) const {
    if (!cache.o)
      check(launch_operands(operand_type(type), c, o.defined() ? o.data_ptr() : nullptr,
                            exponent_scale.data_ptr<float>(), residual_scale.data_ptr<float>(), stream));
    device::multiply(matrix(z, c), x, operands(c).t());
    return {z.data_ptr<float>(), B, in.y.const_data_ptr<int64_t>(), residual_scale.const_data_ptr<float>() + begin(c)};
  }
};

// What the forward pass saved, and the incoming gradients, checked.
struct Saved {
  Tensor rest, topk_classes;  // [B], [B, k]
  Tensor d_rest, d_target;    // [B]
  optional<Tensor> d_topk;    // [B, k]

  Upstream raw(const Tensor& x /* [B, d] */, const Tensor& d_rest_scale /* [1] */) const {
    return {x.const_data_ptr<float>(),
            rest.const_data_ptr<float>(),
            d_rest.const_data_ptr<float>(),
            d_target.const_data_ptr<float>(),
            d_topk ? d_topk->const_data_ptr<float>() : nullptr,
            topk_classes.const_data_ptr<int64_t>(),
            d_topk ? topk_classes.size(1) : 0,
            d_rest_scale.const_data_ptr<float>()};
  }
};

Saved checked_saved(const Tensor& x, const Tensor& rest, const Tensor& topk_classes, const Tensor& d_rest,
                    const Tensor& d_target, const optional<Tensor>& d_topk) {
  const int64_t B = x.size(0), k = topk_classes.dim() == 2 ? topk_classes.size(1) : 0;
  const auto like = [&](const char* name, const Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
    return checked_like(name, t, sizes, type, x.device());
  };
  return {like("rest", rest, {B}, at::kFloat), like("topk_classes", topk_classes, {B, k}, at::kLong),
          like("d_rest", d_rest, {B}, at::kFloat), like("d_target", d_target, {B}, at::kFloat),
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

// float16 has a small exponent range: a power of two scales d_rest so that the largest g is near 2^14. 1 for other
// types.
Tensor d_rest_scale_of(const Tensor& d_rest /* [B] */, at::ScalarType type) {
  if (type != at::kHalf) return at::ones({1}, d_rest.options());
  const Tensor exponent = std::get<1>(at::frexp(d_rest.abs().amax(0, true)));
  return at::ldexp(at::ones({1}, d_rest.options()), at::rsub(exponent, 14).clamp_max(kMaxScaleExponent));
}

// Into how many products dx = g o is split along the classes (split-K): it has few tiles, too few to keep a GPU busy. A
// power of two, since chunks are multiples of 64 classes.
int64_t splits_of(int64_t B, int64_t d) {
  const int64_t tiles = ((B + kTileRows - 1) / kTileRows) * ((d + kTileColumns - 1) / kTileColumns);
  int64_t splits = 1;
  while (2 * splits <= kMostSplits && 2 * splits * tiles <= kMultiprocessors) splits *= 2;
  return splits;
}

// splits += g o; a chunk that is not divisible by the number of splits is added to the first.
void add_row_products(const Tensor& splits /* [s, B, d] */, const Tensor& g /* [B, n] */,
                      const Tensor& o /* [n, d] */) {
  const int64_t n = g.size(1), s = n % splits.size(0) ? 1 : splits.size(0), part = n / s;
  device::multiply_add(splits.narrow(0, 0, s), g.as_strided({s, g.size(0), part}, {part, n, 1}),
                       o.as_strided({s, part, o.size(1)}, {part * o.stride(0), o.stride(0), 1}));
}

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

// The gradients of one chunk of classes: adds to dx; dw and db are complete.
void add_chunk(const ClassChunks& chunks, const Classes& c, const Upstream& u, const Entries& entries,
               const Tensor& workspace, const Tensor& splits, const Gradients& out,
               const Tensor& dw /* [n, d] or undefined */) {
  const Logits z = chunks.products(c);
  check(launch_nontarget_lse_bwd(operand_type(chunks.type), z, c, u, workspace.data_ptr(), chunks.stream));
  const Tensor g = chunks.matrix(workspace, c);
  if (out.dx.defined()) add_row_products(splits, g, chunks.operands(c));
  if (dw.defined()) device::multiply(dw, g.t(), chunks.x);
  if (out.db.defined()) out.db.narrow(0, c.first, c.n).copy_(at::sum(g, {0}, false, at::kFloat));
  if (!dw.defined() && !out.db.defined()) return;
  const float* exponent_scale = chunks.exponent_scale.const_data_ptr<float>() + chunks.begin(c);
  check(launch_weight_gradient(c, u, entries, exponent_scale, z.residual_scale,
                               dw.defined() ? dw.data_ptr<float>() : nullptr,
                               out.db.defined() ? out.db.data_ptr<float>() + c.first : nullptr, chunks.stream));
}

// The whole backward pass; calls take(c, dw) after every chunk with the gradient of its classes.
template <typename F>
void sweep(const ClassChunks& chunks, const Saved& saved, const Gradients& out, const F& take) {
  const Operands& in = chunks.in;
  const auto options = in.x.options();
  const Tensor d_rest_scale = d_rest_scale_of(saved.d_rest, chunks.type);
  const Upstream u = saved.raw(in.x, d_rest_scale);
  const SortedEntries entries(in.y, saved);
  const Tensor splits = at::zeros({out.dx.defined() ? splits_of(chunks.B, chunks.d) : 0, chunks.B, chunks.d}, options);
  const Tensor workspace =
      chunks.type == at::kFloat ? chunks.z : at::empty({chunks.B * chunks.step}, options.dtype(chunks.type));
  if (out.dx.defined())  // targets and top-k first: `take` may change the weights
    check(launch_row_gradient(classes_of(in, nullptr, 0, 0), u, in.y.const_data_ptr<int64_t>(), chunks.B,
                              out.dx.data_ptr<float>(), chunks.stream));
  const bool all = out.dw.defined() && out.dw.size(0) == chunks.C;
  for (int64_t first = 0; first < chunks.C; first += chunks.step) {
    const Classes c = chunks.classes(first);
    const Tensor dw = out.dw.defined() ? out.dw.narrow(0, all ? first : 0, c.n) : Tensor();
    add_chunk(chunks, c, u, entries.raw(), workspace, splits, out, dw);
    take(c, dw);
  }
  if (out.dx.defined())
    check(launch_add_splits(u, splits.const_data_ptr<float>(), splits.size(0), chunks.B * chunks.d,
                            out.dx.data_ptr<float>(), chunks.stream));
}

}  // namespace

Tensor target_logit(const Tensor& x,                    // [B, d]
                    const Tensor& w,                    // [C, d]
                    const Tensor& y,                    // [B]
                    const optional<Tensor>& bias,       // [C]
                    const optional<Tensor>& class_ids,  // [n]
                    bool normalize_weight) {
  const Operands in = checked_layout(x, w, y, bias, class_ids, normalize_weight);
  check_types(x.scalar_type(), {});
  const c10::DeviceGuard guard(x.device());
  const int64_t B = x.size(0);
  Tensor target = at::empty({B}, in.x.options());
  check(launch_target_logit(classes_of(in, nullptr, 0, 0), in.x.const_data_ptr<float>(), in.y.const_data_ptr<int64_t>(),
                            B, target.data_ptr<float>(), device::stream_of(x)));
  return target;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> nontarget_lse_fwd(const Tensor& x,                    // [B, d]
                                                                     const Tensor& w,                    // [C, d]
                                                                     const Tensor& y,                    // [B]
                                                                     const optional<Tensor>& bias,       // [C]
                                                                     const optional<Tensor>& class_ids,  // [n]
                                                                     const optional<Tensor>& bend,       // [B, 4]
                                                                     bool normalize_weight, int64_t pool, int64_t topk,
                                                                     optional<at::ScalarType> compute_dtype, bool,
                                                                     const optional<Tensor>& operands,  // [C, d]
                                                                     const optional<Tensor>& scales,    // [2, C]
                                                                     bool keep_exponentials) {
  const Operands in = checked_layout(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  TORCH_CHECK_VALUE(topk >= 0, "topk = ", topk, "; want 0 or more");
  TORCH_CHECK_VALUE(!keep_exponentials, "these kernels keep no exponentials");
  const c10::DeviceGuard guard(x.device());
  const ClassChunks chunks(in, compute_dtype, operands, scales);
  const auto options = in.x.options();
  const int64_t B = chunks.B, parts = parts_of(B);
  const auto list = [&](at::IntArrayRef sizes) {
    return std::pair(at::full(sizes, -INFINITY, options), at::full(sizes, -1, options.dtype(at::kLong)));
  };
  Tensor shift = at::full({B, parts}, kNoShift, options), sum = at::zeros({B, parts}, options);
  auto [part_values, part_classes] = list({B, parts, topk});
  const RowState state{shift.data_ptr<float>(), sum.data_ptr<float>(), part_values.data_ptr<float>(),
                       part_classes.data_ptr<int64_t>(), topk};
  for (int64_t first = 0; first < chunks.C && B; first += chunks.step) {
    const Classes c = chunks.classes(first);
    check(launch_nontarget_lse_fwd(chunks.products(c), c, state, chunks.stream));
  }
  Tensor rest = at::empty({B}, options);
  auto [values, classes] = list({B, topk});
  check(launch_merge_parts(state, B, rest.data_ptr<float>(), values.data_ptr<float>(), classes.data_ptr<int64_t>(),
                           chunks.stream));
  return {rest, values, classes, at::empty({0}, options), at::empty({0}, options)};
}

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
                                                     const Tensor&,                   // [0]
                                                     const Tensor&,                   // [0]
                                                     const Tensor& d_rest,            // [B]
                                                     const Tensor& d_target,          // [B]
                                                     const optional<Tensor>& d_topk,  // [B, k]
                                                     bool need_dx, bool need_dw, bool need_db) {
  const Operands in = checked_layout(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  const c10::DeviceGuard guard(x.device());
  const ClassChunks chunks(in, compute_dtype);
  const Saved saved = checked_saved(in.x, rest, topk_classes, d_rest, d_target, d_topk);
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
                                                    const Tensor&,                   // [0]
                                                    const Tensor&,                   // [0]
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
  const ClassChunks chunks(in, compute_dtype, operands, scales);
  const Saved saved = checked_saved(in.x, rest, topk_classes, d_rest, d_target, d_topk);
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
