// Checks of the op arguments, shared by the CPU and CUDA launchers. Shapes were checked in Python; what is checked
// here keeps memory safe and names the offending label.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace fastmargin {

inline void check_operands(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                           const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& rows) {
  TORCH_CHECK_VALUE(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1) && y.dim() == 1 && y.size(0) == x.size(0),
                    "want x [B, d], w [C, d], y [B]; got ", x.sizes(), ", ", w.sizes(), ", ", y.sizes());
  TORCH_CHECK_VALUE(w.scalar_type() == x.scalar_type() && y.scalar_type() == at::kLong,
                    "want x and w of one dtype and y int64; got ", x.scalar_type(), ", ", w.scalar_type(), ", ",
                    y.scalar_type());
  TORCH_CHECK_VALUE(w.device() == x.device() && y.device() == x.device(), "x, w and y are on ", x.device(), ", ",
                    w.device(), ", ", y.device());
  TORCH_CHECK_VALUE(!bias || (bias->dim() == 1 && bias->size(0) == w.size(0) && bias->scalar_type() == x.scalar_type()),
                    "want bias [C] of x's dtype");
  TORCH_CHECK_VALUE(!rows || (rows->dim() == 1 && rows->scalar_type() == at::kLong), "want rows [n] int64");
}

inline void check_rows(const std::optional<at::Tensor>& rows /* [n] */, int64_t classes) {
  if (!rows) return;
  const int64_t* r = rows->const_data_ptr<int64_t>();
  for (int64_t j = 0; j < rows->size(0); ++j)
    TORCH_CHECK_VALUE(r[j] >= 0 && r[j] < classes && (j == 0 || r[j - 1] < r[j]), "rows[", j, "] = ", r[j],
                      ": want sorted, unique class ids in [0, ", classes, ")");
}

inline void check_labels(const at::Tensor& y /* [B] contiguous */, int64_t classes) {
  const int64_t* label = y.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < y.size(0); ++i)
    TORCH_CHECK_VALUE(label[i] >= -1 && label[i] < classes, "label ", label[i], " of row ", i, " is outside [-1, ",
                      classes, ")");
}

// What the CPU ops ask of their operands; reads every label and every selected row.
inline void check_all(const at::Tensor& x, const at::Tensor& w, const at::Tensor& y,
                      const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& rows,
                      bool normalize_weight) {
  check_operands(x, w, y, bias, rows);
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, "want float32 or float64; got ",
                    x.scalar_type());
  TORCH_CHECK_VALUE(!(bias && normalize_weight), "a bias needs normalize_weight=False");
  check_rows(rows, w.size(0));
  check_labels(y.contiguous(), rows ? rows->size(0) : w.size(0));
}

template <typename F>
auto dispatch(at::ScalarType dtype, const F& f) {
  return dtype == at::kFloat ? f(float()) : f(double());
}

}  // namespace fastmargin
