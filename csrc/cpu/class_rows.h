// Reads class weights a block at a time, with any strides; all classes or those of class_ids.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>

namespace fastmargin {

template <typename T>
class ClassRows {
 public:
  ClassRows(const at::Tensor& w /* [C, d] */, const std::optional<at::Tensor>& class_ids /* [n] or none */)
      : data_(w.const_data_ptr<T>()),
        stride_(w.stride(0)),
        column_(w.size(1) == 1 ? 1 : w.stride(1)),
        class_ids_(class_ids ? class_ids->const_data_ptr<int64_t>() : nullptr),
        count(class_ids ? class_ids->size(0) : w.size(0)),
        d(w.size(1)) {}

  // Whether block() and row() copy into the caller's buffer: with class_ids, with columns that are not adjacent, and
  // with rows that overlap or lie so far apart that a matrix product takes no such leading dimension.
  bool copies() const { return class_ids_ != nullptr || column_ != 1 || stride_ < d || stride_ > (1 << 24); }

  // n consecutive classes from index `first`: in place, or gathered into buffer [n, d]; sets ld, the leading dimension.
  const T* block(int64_t first, int64_t n, T* buffer, int64_t& ld) const {
    ld = copies() ? d : stride_;
    if (!copies()) return data_ + first * stride_;
    for (int64_t j = 0; j < n; ++j) {
      const T* in = source(first + j);
      T* out = buffer + j * d;
      if (column_ == 1) {
        std::copy_n(in, d, out);
      } else {
        for (int64_t c = 0; c < d; ++c) out[c] = in[c * column_];
      }
    }
    return buffer;
  }

  // The row of w of class index j.
  int64_t id(int64_t j) const { return class_ids_ ? class_ids_[j] : j; }

  const T* row(int64_t j, T* buffer /* [d] */) const {
    int64_t ld;
    return block(j, 1, buffer, ld);
  }

 private:
  const T* source(int64_t j) const { return data_ + id(j) * stride_; }

  const T* data_;
  int64_t stride_, column_;
  const int64_t* class_ids_;

 public:
  const int64_t count, d;
};

}  // namespace fastmargin
