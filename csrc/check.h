// Checks of op arguments: they keep memory safe and name the offending label. Messages about shapes are for callers of
// the raw ops; the Python functions check the same first, with longer messages.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace fastmargin {

// The inputs of the class ops: checked, and contiguous except for w.
struct Operands {
  at::Tensor x;                         // [B, d]
  at::Tensor w;                         // [C, d] any strides
  at::Tensor y;                         // [B] class indices: in [-1, C), or with class_ids in [-1, n)
  std::optional<at::Tensor> bias;       // [C]
  std::optional<at::Tensor> class_ids;  // [n] sorted, unique, in [0, C); on a GPU the last may be -1: no class
  bool normalize_weight;

  int64_t classes() const { return class_ids ? class_ids->size(0) : w.size(0); }
};

inline void check_layout(const Operands& o) {
  TORCH_CHECK_VALUE(
      o.x.dim() == 2 && o.w.dim() == 2 && o.x.size(1) == o.w.size(1) && o.y.dim() == 1 && o.y.size(0) == o.x.size(0),
      "want x [B, d], w [C, d], y [B]; got ", o.x.sizes(), ", ", o.w.sizes(), ", ", o.y.sizes());
  TORCH_CHECK_VALUE(o.x.scalar_type() == at::kFloat || o.x.scalar_type() == at::kDouble,
                    "want float32 or float64; got ", o.x.scalar_type());
  TORCH_CHECK_VALUE(o.w.scalar_type() == o.x.scalar_type() && o.y.scalar_type() == at::kLong,
                    "want x and w of one dtype and y int64; got ", o.x.scalar_type(), ", ", o.w.scalar_type(), ", ",
                    o.y.scalar_type());
  TORCH_CHECK_VALUE(
      !o.bias || (o.bias->dim() == 1 && o.bias->size(0) == o.w.size(0) && o.bias->scalar_type() == o.x.scalar_type()),
      "want bias [C] of x's dtype");
  TORCH_CHECK_VALUE(!(o.bias && o.normalize_weight), "a bias needs normalize_weight=False");
  TORCH_CHECK_VALUE(!o.class_ids || (o.class_ids->dim() == 1 && o.class_ids->scalar_type() == at::kLong),
                    "want class_ids [n] int64");
  for (const auto& other : {std::optional(o.w), std::optional(o.y), o.bias, o.class_ids})
    TORCH_CHECK_VALUE(!other || other->device() == o.x.device(), "x is on ", o.x.device(), ", another argument on ",
                      other->device());
}

// bend and pool are in the schemas already, but no kernel implements them yet: refused, not ignored.
inline void refuse(const std::optional<at::Tensor>& bend, int64_t pool) {
  TORCH_CHECK_VALUE(!bend, "bend (rules that bend negatives) is not supported by this backend");
  TORCH_CHECK_VALUE(pool == 1, "pool = ", pool, " (sub-centers) is not supported by this backend; want 1");
}

inline void refuse_cached_operands(const std::optional<at::Tensor>& operands, const std::optional<at::Tensor>& scales) {
  TORCH_CHECK_VALUE(!operands && !scales, "cached operands of the weights (operands, scales) are for GPUs only");
}

inline void check_class_ids(const at::Tensor& class_ids /* [n] contiguous */, int64_t classes) {
  const int64_t* id = class_ids.const_data_ptr<int64_t>();
  for (int64_t j = 0; j < class_ids.size(0); ++j)
    TORCH_CHECK_VALUE(id[j] >= 0 && id[j] < classes && (j == 0 || id[j - 1] < id[j]), "class_ids[", j, "] = ", id[j],
                      ": want sorted, unique class ids in [0, ", classes, ")");
}

inline void check_labels(const Operands& o) {
  const int64_t* label = o.y.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < o.y.size(0); ++i)
    TORCH_CHECK_VALUE(label[i] >= -1 && label[i] < o.classes(), "label ", label[i], " of row ", i, " is outside [-1, ",
                      o.classes(), ")");
}

// Checks shapes, dtypes and devices, but reads no values: on a GPU that would wait for the device.
inline Operands checked_layout(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                               const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& class_ids,
                               bool normalize_weight) {
  Operands o{x, w, y, bias, class_ids, normalize_weight};
  check_layout(o);
  o.x = x.contiguous();
  o.y = y.contiguous();
  if (bias) o.bias = bias->contiguous();
  if (class_ids) o.class_ids = class_ids->contiguous();
  return o;
}

// The same for the CPU, where every label and every class id is checked, too.
inline Operands checked_values(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                               const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& class_ids,
                               bool normalize_weight) {
  Operands o = checked_layout(x, w, y, bias, class_ids, normalize_weight);
  if (o.class_ids) check_class_ids(*o.class_ids, w.size(0));
  check_labels(o);
  return o;
}

// A further argument of a backward op.
inline at::Tensor checked_like(const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType dtype,
                               at::Device device = at::kCPU) {
  TORCH_CHECK_VALUE(t.sizes() == sizes && t.scalar_type() == dtype && t.device() == device, "want ", name, " ", sizes,
                    " ", dtype, " on ", device, "; got ", t.sizes(), " ", t.scalar_type(), " on ", t.device());
  return t.contiguous();
}

// The inputs of pairwise_potential: checked, contiguous. Without b, the pairs are those of a with itself.
struct Pairs {
  at::Tensor a, b, a_ids, b_ids;       // [N, d], [M, d], [N], [M]; b is a where there is none
  std::optional<at::Tensor> b_weight;  // [M]
  bool one_side;

  Pairs(const at::Tensor& points, const std::optional<at::Tensor>& others, const at::Tensor& ids,
        const std::optional<at::Tensor>& other_ids, const std::optional<at::Tensor>& weight)
      : one_side(!others) {
    const auto dtype = points.scalar_type();
    TORCH_CHECK_VALUE(points.dim() == 2 && points.size(1) > 0, "want a [N, d], d above 0; got ", points.sizes());
    TORCH_CHECK_VALUE(dtype == at::kFloat || dtype == at::kDouble, "want float32 or float64; got ", dtype);
    TORCH_CHECK_VALUE(others.has_value() == other_ids.has_value() && (others || !weight),
                      "want b with its ids, or neither and no weights");
    const auto like = [&](const char* name, const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
      return checked_like(name, t, sizes, type, points.device());
    };
    a = points.contiguous();
    a_ids = like("a_ids", ids, {a.size(0)}, at::kLong);
    const int64_t M = others ? (others->dim() ? others->size(0) : 0) : a.size(0);
    b = others ? like("b", *others, {M, a.size(1)}, dtype) : a;
    b_ids = others ? like("b_ids", *other_ids, {M}, at::kLong) : a_ids;
    if (weight) b_weight = like("b_weight", *weight, {M}, dtype);
  }
};

template <typename F>
auto dispatch(at::ScalarType dtype, const F& f) {
  return dtype == at::kFloat ? f(float()) : f(double());
}

}  // namespace fastmargin
