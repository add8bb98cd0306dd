// Blocks of classes, divided among threads: what the forward and the backward pass of nontarget_lse both iterate over.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../check.h"
#include "capability.h"
#include "class_rows.h"
#include "gemm.h"
#include "nontarget_lse_kernel.h"

namespace fastmargin {

using at::Tensor;
using std::optional;

inline void check_compute(at::ScalarType dtype, const optional<at::ScalarType>& compute_dtype) {
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

constexpr int64_t kBlock = 256;    // classes of a tile
constexpr int64_t kRowTile = 256;  // rows of a tile, at most

// t with rows of `fill` appended, B in all.
inline Tensor padded(const Tensor& t /* [unpadded, ...] */, int64_t B, double fill) {
  if (t.size(0) == B) return t;
  auto sizes = t.sizes().vec();
  sizes[0] = B;
  Tensor out = at::full(sizes, fill, t.options());
  out.narrow(0, 0, t.size(0)).copy_(t);
  return out;
}

// A matrix as operand of products: float32 and float64 in place; for bfloat16 a rounded copy, and one in VNNI layout.
template <typename O>
struct PackedOperand {
  using T = Sum<O>;
  static constexpr int64_t lanes = Operand<O>::lanes;
  std::vector<O> rounded_;
  std::vector<Word<O>> vnni_;
  const O* left = nullptr;         // [n, ld], zeros after the d numbers of a row
  const Word<O>* right = nullptr;  // [n / lanes, ld_right]
  int64_t ld = 0, ld_right = 0;

  static int64_t whole(int64_t size) { return at::divup(size, lanes) * lanes; }  // rounded up to full words

  void set(const T* in, int64_t ld_in, int64_t n, int64_t d, bool need_right) {
    if constexpr (lanes == 1) {
      left = right = in;
      ld = ld_right = ld_in;
    } else {
      const auto& kernels = nontarget_lse_kernels<O>();
      ld = whole(d), ld_right = d;
      rounded_.resize(n * ld);
      kernels.round_rows(in, ld_in, n, d, rounded_.data(), ld);
      left = rounded_.data();
      if (!need_right) return;
      vnni_.resize(whole(n) / lanes * d);
      kernels.pack_vnni(left, ld, n, d, vnni_.data());
      right = vnni_.data();
    }
  }
};

// What both passes read: the operands, and x packed for the products. Rows of zeros without a class pad x to B.
template <typename O>
struct Problem {
  using T = Sum<O>;
  static constexpr int64_t lanes = Operand<O>::lanes;
  Operands o;                 // owns w and class_ids
  int64_t unpadded, B, d, C;  // rows of the caller, rows with padding, features, classes
  Tensor x_, y_, bias_;       // own what the pointers below point to
  ClassRows<T> w;
  const T *x, *bias;  // [B, d], [C] or null
  const int64_t* y;   // [B]
  int64_t tile;
  bool normalize;
  const NontargetLseKernels<O>& kernels = nontarget_lse_kernels<O>();
  PackedOperand<O> x_operand;
  std::vector<Word<O>> transposed_;  // tiles of rows, each as x^T, one after the other

  explicit Problem(const Operands& operands)
      : o(operands),
        unpadded(o.x.size(0)),
        B(padded_count(unpadded)),
        d(o.x.size(1)),
        C(o.classes()),
        x_(padded(o.x, B, 0)),
        y_(padded(o.y, B, -1)),
        w(o.w, o.class_ids),
        x(x_.template const_data_ptr<T>()),
        bias(nullptr),
        y(y_.template const_data_ptr<int64_t>()),
        normalize(o.normalize_weight) {
    if (o.bias) {
      bias_ = o.class_ids ? at::index_select(*o.bias, 0, *o.class_ids) : *o.bias;
      bias = bias_.template const_data_ptr<T>();
    }
    const int64_t tiles = std::max<int64_t>(1, at::divup(B, kRowTile));
    tile = std::max<int64_t>(kPad, padded_count(at::divup(B, tiles)));
    x_operand.set(x, d, B, d, true);
    transpose();
  }

  void transpose() {
    transposed_.resize(B * width());
    for (int64_t i0 = 0; i0 < B; i0 += tile)
      kernels.transpose(reinterpret_cast<const Word<O>*>(x_operand.left + i0 * x_operand.ld), std::min(tile, B - i0),
                        width(), transposed_.data() + i0 * width());
  }

  int64_t width() const { return at::divup(d, lanes); }  // words of a row
  // Of the tile from row i0: x^T [width, m], and x as right operand [m / lanes, d].
  const Word<O>* transposed(int64_t i0) const { return transposed_.data() + i0 * width(); }
  const Word<O>* right(int64_t i0) const { return x_operand.right + i0 / lanes * x_operand.ld_right; }
  int64_t blocks() const { return at::divup(C, kBlock); }
};

// A thread's buffers for one block of classes and one tile of logits.
template <typename O>
struct Block {
  using T = Sum<O>;
  const Problem<O>& p;
  std::vector<T> scale_, z_, copy_;
  std::vector<Word<O>> operand_;
  std::vector<int32_t> target_;
  PackedOperand<O> w_operand;
  int64_t first = 0, n = 0, ld = 0;
  const T* w = nullptr;
  T largest_scale = 1;

  explicit Block(const Problem<O>& problem)
      : p(problem),
        scale_(kBlock, T(1)),
        z_(kBlock * p.tile),
        copy_(p.w.copies() ? kBlock * p.d : 0),
        operand_(p.lanes > 1 ? kBlock / p.lanes * p.tile : 0),
        target_(p.tile) {}
  ~Block() { release<O>(); }

  void load(int64_t index, bool need_right) {
    first = index * kBlock;
    n = std::min(kBlock, p.C - first);
    w = p.w.block(first, n, copy_.data(), ld);
    if (p.normalize) p.kernels.inverse_norms(w, ld, n, p.d, scale_.data());
    largest_scale = *std::max_element(scale_.begin(), scale_.begin() + n);
    w_operand.set(w, ld, n, p.d, need_right);
  }

  // The products of this block with rows i0 .. i0 + m.
  Tile<T> products(int64_t i0, int64_t m) {
    gemm(n, m, p.width() * p.lanes, w_operand.left, w_operand.ld, p.transposed(i0), m, z_.data(), m, false);
    for (int64_t i = 0; i < m; ++i) {
      const int64_t own = p.y[i0 + i] - first;
      target_[i] = own >= 0 && own < n ? int32_t(own) : -1;
    }
    return {z_.data(), n, m, first, scale_.data(), p.bias ? p.bias + first : nullptr, target_.data()};
  }

  // Where the tile's e or g is written, as operand of the next product: over z, unless it is rounded.
  Word<O>* operand() {
    if constexpr (Problem<O>::lanes == 1) return z_.data();
    return operand_.data();
  }
};

// Divides the blocks into equal contiguous ranges, one per thread, and calls work(thread, first block, end block).
template <typename F>
void share_blocks(int64_t blocks, int64_t threads, const F& work) {
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) work(t, blocks * t / threads, blocks * (t + 1) / threads);
  });
}

inline int64_t thread_count(int64_t blocks) {
  return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), blocks));
}

}  // namespace fastmargin
