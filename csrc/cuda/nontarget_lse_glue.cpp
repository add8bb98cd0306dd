// nontarget_lse on a GPU: checks, allocation, and the loop over waves of classes whose logits stay in the L2 cache.
//
//   forward   o = operands of the wave, or of its shadow;  z = x o^T;  sums and the k best, row by row
//   backward  o and z again;  g, for both products;  dx += g o in splits of the wave;  dw = g^T x, then projected
//
// Matrix products are ATen's, all else is in nontarget_lse.cu. Nothing waits for the device, so a graph can be
// captured; the memory is that of one wave, 256 classes at least. Formulas: fastmargin/ops/nontarget_lse.py. Letters: B
// rows, n classes of a wave, d, k.
#include "glue.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/floor_divide.h>
#include <ATen/ops/frexp.h>
#include <ATen/ops/full.h>
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

namespace fastmargin::cuda {
namespace {

constexpr int64_t kMostClasses = 1 << 14;               // of a wave: few long rows keep few multiprocessors busy
constexpr int64_t kMostLift = 100;                      // as a power of two: what a float32 has room for
constexpr int64_t kTileRows = 128, kTileColumns = 256;  // of a product's tile, about
constexpr int64_t kMultiprocessors = 132, kMostSplits = 8;

void check_types(at::ScalarType dtype, const optional<at::ScalarType>& compute) {
  TORCH_CHECK_VALUE(dtype == at::kFloat, "want float32 on a GPU; got ", dtype);
  TORCH_CHECK_VALUE(!compute || *compute == at::kBFloat16 || *compute == at::kHalf,
                    "want compute_dtype bfloat16 or float16; got ", *compute);
}

// Of a wave, or, with first and n 0, of what works on single classes.
Classes classes_of(const Operands& in, int64_t first, int64_t n) {
  return {in.w.const_data_ptr<float>(),
          in.w.stride(0),
          in.w.stride(1),
          in.bias ? in.bias->const_data_ptr<float>() : nullptr,
          in.class_ids ? in.class_ids->const_data_ptr<int64_t>() : nullptr,
          in.classes(),
          in.x.size(1),
          in.normalize_weight,
          first,
          n};
}

// What both passes walk over: the operands, and room for one wave.
struct Waves {
  Operands in;
  at::ScalarType type;      // of the products' operands
  int64_t B, d, C, step;    // rows, features, classes, classes of a wave
  Tensor x, z;              // [B, d], [B step]
  Tensor o, power, factor;  // [step, d], [step], [step]; of all classes where a shadow has them
  void* stream;
  Shadow shadow;

  Waves(const Operands& given, const optional<at::ScalarType>& compute, const optional<Tensor>& operands = {},
        const optional<Tensor>& scales = {})
      : in(given),
        type(compute.value_or(at::kFloat)),
        B(in.x.size(0)),
        d(in.x.size(1)),
        C(in.classes()),
        step(std::min(C,
                      std::clamp<int64_t>(kWaveBytes / 4 / std::max({B, d, int64_t(1)}) / 64 * 64, 256, kMostClasses))),
        x(in.x.to(type)),
        stream(device::stream_of(in.x)),
        shadow(shadow_of(in.w, in.normalize_weight, type, operands, scales)) {
    TORCH_CHECK_VALUE(!operands || !in.class_ids, "want the operands of all classes, or class_ids");
    const auto room = in.x.options();
    z = at::empty({B * step}, room);
    if (operands) {
      o = *operands;
      power = scales->select(0, 0);
      factor = scales->select(0, 1);
      return;
    }
    if (type != at::kFloat || in.class_ids || in.w.stride(1) != 1) o = at::empty({step, d}, room.dtype(type));
    power = at::empty({step}, room);
    factor = at::empty({step}, room);
  }

  Classes classes(int64_t first) const { return classes_of(in, first, std::min(step, C - first)); }

  // Where a wave's operands and scales begin.
  int64_t begin(const Classes& c) const { return shadow.o ? c.first : 0; }

  Tensor operands(const Classes& c) const {
    return o.defined() ? o.narrow(0, begin(c), c.n) : in.w.narrow(0, c.first, c.n);
  }

  Tensor wide(const Tensor& t, const Classes& c) const { return t.narrow(0, 0, B * c.n).view({B, c.n}); }

  // z of a wave.
  Logits products(const Classes& c) const {
    if (!shadow.o)
      check(launch_operands(operand_type(type), c, o.defined() ? o.data_ptr() : nullptr, power.data_ptr<float>(),
                            factor.data_ptr<float>(), stream));
    device::multiply(wide(z, c), x, operands(c).t());
    return {z.data_ptr<float>(), B, in.y.const_data_ptr<int64_t>(), factor.const_data_ptr<float>() + begin(c)};
  }
};

// What the forward pass left and what came from above, checked.
struct Saved {
  Tensor rest, ids;         // [B], [B, k]
  Tensor d_rest, d_target;  // [B]
  optional<Tensor> d_topk;  // [B, k]

  Upstream raw(const Tensor& x /* [B, d] */, const Tensor& lift /* [1] */) const {
    return {x.const_data_ptr<float>(),
            rest.const_data_ptr<float>(),
            d_rest.const_data_ptr<float>(),
            d_target.const_data_ptr<float>(),
            d_topk ? d_topk->const_data_ptr<float>() : nullptr,
            ids.const_data_ptr<int64_t>(),
            d_topk ? ids.size(1) : 0,
            lift.const_data_ptr<float>()};
  }
};

Saved checked_saved(const Tensor& x, const Tensor& rest, const Tensor& ids, const Tensor& d_rest,
                    const Tensor& d_target, const optional<Tensor>& d_topk) {
  const int64_t B = x.size(0), k = ids.dim() == 2 ? ids.size(1) : 0;
  const auto like = [&](const char* name, const Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
    return checked_like(name, t, sizes, type, x.device());
  };
  return {like("rest", rest, {B}, at::kFloat), like("topk_classes", ids, {B, k}, at::kLong),
          like("d_rest", d_rest, {B}, at::kFloat), like("d_target", d_target, {B}, at::kFloat),
          d_topk ? optional(like("d_topk", *d_topk, {B, k}, at::kFloat)) : std::nullopt};
}

// d_target and d_topk in the order of their classes.
struct SortedEntries {
  Tensor place, row, value;  // [m]

  SortedEntries(const Tensor& y, const Saved& s) {
    Tensor places = y.unsqueeze(1), values = s.d_target.unsqueeze(1), order;
    if (s.d_topk) {
      places = at::cat({places, s.ids}, 1);
      values = at::cat({values, *s.d_topk}, 1);
    }
    std::tie(place, order) = at::sort(places.flatten(), /*stable=*/true, 0, false);
    value = values.flatten().index_select(0, order);
    row = at::floor_divide(order, places.size(1));
  }

  Entries raw() const {
    return {place.const_data_ptr<int64_t>(), row.const_data_ptr<int64_t>(), value.const_data_ptr<float>(),
            place.size(0)};
  }
};

// float16 has few exponents: a power of two, 1 for other types, lifts g up to where the largest is near 2^14.
Tensor lift_of(const Tensor& d_rest /* [B] */, at::ScalarType type) {
  if (type != at::kHalf) return at::ones({1}, d_rest.options());
  const Tensor exponent = std::get<1>(at::frexp(d_rest.abs().amax(0, true)));
  return at::ldexp(at::ones({1}, d_rest.options()), at::rsub(exponent, 14).clamp_max(kMostLift));
}

// Into how many products dx = g o is split, so that its few tiles keep a GPU busy: a power of two, which divides a
// wave.
int64_t splits_of(int64_t B, int64_t d) {
  const int64_t tiles = ((B + kTileRows - 1) / kTileRows) * ((d + kTileColumns - 1) / kTileColumns);
  int64_t splits = 1;
  while (2 * splits <= kMostSplits && 2 * splits * tiles <= kMultiprocessors) splits *= 2;
  return splits;
}

// splits += g o; a wave that does not divide evenly goes to the first.
void add_row_products(const Tensor& splits /* [s, B, d] */, const Tensor& g /* [B, n] */,
                      const Tensor& o /* [n, d] */) {
  const int64_t n = g.size(1), s = n % splits.size(0) ? 1 : splits.size(0), part = n / s;
  device::multiply_add(splits.narrow(0, 0, s), g.as_strided({s, g.size(0), part}, {part, n, 1}),
                       o.as_strided({s, part, o.size(1)}, {part * o.stride(0), o.stride(0), 1}));
}

// dx, dw and db; those that are not wanted are undefined. dw holds all classes, or one wave after the other.
struct Gradients {
  at::TensorOptions options;
  Tensor dx, dw, db;  // [B, d], [C, d] or [step, d], [C]

  Gradients(const Waves& waves, bool need_dx, optional<int64_t> classes, bool need_db) : options(waves.in.x.options()) {
    if (need_dx) dx = at::empty({waves.B, waves.d}, options);
    if (classes) dw = waves.B ? at::empty({*classes, waves.d}, options) : at::zeros({*classes, waves.d}, options);
    if (need_db) db = at::zeros({waves.C}, options);
  }

  Tensor given(const Tensor& t) const { return t.defined() ? t : at::empty({0}, options); }
};

// The gradients of one wave of classes: dx is added to, dw and db are complete.
void add_wave(const Waves& waves, const Classes& c, const Upstream& u, const Entries& entries, const Tensor& room,
              const Tensor& splits, const Gradients& out, const Tensor& dw /* [n, d] or undefined */) {
  const Logits z = waves.products(c);
  check(launch_nontarget_lse_bwd(operand_type(waves.type), z, c, u, room.data_ptr(), waves.stream));
  const Tensor g = waves.wide(room, c);
  if (out.dx.defined()) add_row_products(splits, g, waves.operands(c));
  if (dw.defined()) device::multiply(dw, g.t(), waves.x);
  if (out.db.defined()) out.db.narrow(0, c.first, c.n).copy_(at::sum(g, {0}, false, at::kFloat));
  if (!dw.defined() && !out.db.defined()) return;
  const float* power = waves.power.const_data_ptr<float>() + waves.begin(c);
  check(launch_weight_gradient(c, u, entries, power, z.factor, dw.defined() ? dw.data_ptr<float>() : nullptr,
                               out.db.defined() ? out.db.data_ptr<float>() + c.first : nullptr, waves.stream));
}

// The whole backward pass; `take` is called after every wave with the gradient of its classes.
template <typename F>
void sweep(const Waves& waves, const Saved& saved, const Gradients& out, const F& take) {
  const Operands& in = waves.in;
  const auto options = in.x.options();
  const Tensor lift = lift_of(saved.d_rest, waves.type);
  const Upstream u = saved.raw(in.x, lift);
  const SortedEntries entries(in.y, saved);
  const Tensor splits = at::zeros({out.dx.defined() ? splits_of(waves.B, waves.d) : 0, waves.B, waves.d}, options);
  const Tensor room = waves.type == at::kFloat ? waves.z : at::empty({waves.B * waves.step}, options.dtype(waves.type));
  if (out.dx.defined())  // the targets and the best first, of weights as they are now
    check(launch_row_gradient(classes_of(in, 0, 0), u, in.y.const_data_ptr<int64_t>(), waves.B,
                              out.dx.data_ptr<float>(), waves.stream));
  const bool all = out.dw.defined() && out.dw.size(0) == waves.C;
  for (int64_t first = 0; first < waves.C; first += waves.step) {
    const Classes c = waves.classes(first);
    const Tensor dw = out.dw.defined() ? out.dw.narrow(0, all ? first : 0, c.n) : Tensor();
    add_wave(waves, c, u, entries.raw(), room, splits, out, dw);
    take(c, dw);
  }
  if (out.dx.defined())
    check(launch_add_splits(u, splits.const_data_ptr<float>(), splits.size(0), waves.B * waves.d,
                            out.dx.data_ptr<float>(), waves.stream));
}

}  // namespace

Tensor target_logit(const Tensor& x,                    // [B, d]
                    const Tensor& w,                    // [C, d]
                    const Tensor& y,                    // [B]
                    const optional<Tensor>& bias,       // [C]
                    const optional<Tensor>& class_ids,  // [n]
                    bool normalize_weight) {
  const Operands in = laid_out(x, w, y, bias, class_ids, normalize_weight);
  check_types(x.scalar_type(), {});
  const c10::DeviceGuard guard(x.device());
  const int64_t B = x.size(0);
  Tensor target = at::empty({B}, in.x.options());
  check(launch_target_logit(classes_of(in, 0, 0), in.x.const_data_ptr<float>(), in.y.const_data_ptr<int64_t>(), B,
                            target.data_ptr<float>(), device::stream_of(x)));
  return target;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nontarget_lse_fwd(const Tensor& x,                    // [B, d]
                                                             const Tensor& w,                    // [C, d]
                                                             const Tensor& y,                    // [B]
                                                             const optional<Tensor>& bias,       // [C]
                                                             const optional<Tensor>& class_ids,  // [n]
                                                             const optional<Tensor>& bend,       // [B, 4]
                                                             bool normalize_weight, int64_t pool, int64_t topk,
                                                             optional<at::ScalarType> compute_dtype, bool,
                                                             const optional<Tensor>& operands,  // [C, d]
                                                             const optional<Tensor>& scales /* [2, C] */) {
  const Operands in = laid_out(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  TORCH_CHECK_VALUE(topk >= 0, "topk = ", topk, "; want 0 or more");
  const c10::DeviceGuard guard(x.device());
  const Waves waves(in, compute_dtype, operands, scales);
  const auto options = in.x.options();
  Tensor shift = at::full({waves.B}, kNoShift, options), sum = at::zeros({waves.B}, options);
  Tensor values = at::full({waves.B, topk}, -INFINITY, options);
  Tensor places = at::full({waves.B, topk}, -1, options.dtype(at::kLong));
  const RowState state{shift.data_ptr<float>(), sum.data_ptr<float>(), values.data_ptr<float>(),
                       places.data_ptr<int64_t>(), topk};
  for (int64_t first = 0; first < waves.C && waves.B; first += waves.step) {
    const Classes c = waves.classes(first);
    check(launch_nontarget_lse_fwd(waves.products(c), c, state, waves.stream));
  }
  Tensor rest = at::empty({waves.B}, options);
  check(launch_rest(state, rest.data_ptr<float>(), waves.B, waves.stream));
  return {rest, values, places, at::empty({0}, options)};
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
                                                     const Tensor& d_rest,            // [B]
                                                     const Tensor& d_target,          // [B]
                                                     const optional<Tensor>& d_topk,  // [B, k]
                                                     bool need_dx, bool need_dw, bool need_db) {
  const Operands in = laid_out(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  const c10::DeviceGuard guard(x.device());
  const Waves waves(in, compute_dtype);
  const Saved saved = checked_saved(in.x, rest, topk_classes, d_rest, d_target, d_topk);
  const Gradients out(waves, need_dx, need_dw ? optional(waves.C) : std::nullopt, need_db);
  if (waves.B) sweep(waves, saved, out, [](const Classes&, const Tensor&) {});
  return {out.given(out.dx), out.given(out.dw), out.given(out.db)};
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
                                                    const Tensor& d_rest,            // [B]
                                                    const Tensor& d_target,          // [B]
                                                    const optional<Tensor>& d_topk,  // [B, k]
                                                    bool need_dx, bool need_db,
                                                    at::TensorList state,  // [C, d] each, changed
                                                    std::string_view rule, at::ArrayRef<double> hyper,
                                                    const optional<Tensor>& grad_scale,  // []
                                                    const optional<Tensor>& operands,    // [C, d], changed
                                                    const optional<Tensor>& scales /* [2, C], changed */) {
  const Operands in = laid_out(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  const c10::DeviceGuard guard(x.device());
  const Waves waves(in, compute_dtype, operands, scales);
  const Saved saved = checked_saved(in.x, rest, topk_classes, d_rest, d_target, d_topk);
  const Gradients out(waves, need_dx, waves.step, need_db);
  const ClassStep step(w, state, in.class_ids, rule, hyper, grad_scale, waves.shadow, waves.stream);
  if (waves.B) {
    sweep(waves, saved, out,
          [&](const Classes& c, const Tensor& dw) { step.make(dw.const_data_ptr<float>(), c.first, c.n); });
  } else {
    for (int64_t first = 0; first < waves.C; first += waves.step)
      step.make(out.dw.const_data_ptr<float>(), first, std::min(waves.step, waves.C - first));
  }
  return {out.given(out.dx), out.given(out.db)};
}

}  // namespace fastmargin::cuda
