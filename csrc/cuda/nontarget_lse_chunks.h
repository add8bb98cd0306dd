// nontarget_lse on a GPU: what the forward and the backward pass share: inputs, checks, and chunks of classes.
// Letters: B rows, n classes of a chunk, d, k.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/ge.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cmath>

#include "../check.h"
#include "class_step.h"
#include "device.h"
#include "launch.h"
#include "ops.h"

namespace fastmargin::cuda {

#ifndef FASTMARGIN_LAUNCH_SECONDS
#define FASTMARGIN_LAUNCH_SECONDS 5e-6
#endif
constexpr double kLaunch = FASTMARGIN_LAUNCH_SECONDS, kProduct = 1.6 * kLaunch;  // of the host, about
constexpr double kFlops = 7e14, kBandwidth = 4e12, kCache = 9e12;                // of an H200, about
constexpr int64_t kMostClasses = 1 << 14, kMostDoublings = 4;                    // of a chunk
constexpr int64_t kTileRows = 128, kTileColumns = 256;                           // of a product's tile, about
constexpr int64_t kMostSplits = 8;

inline void check_types(at::ScalarType dtype, const optional<at::ScalarType>& compute) {
  TORCH_CHECK_VALUE(dtype == at::kFloat, "want float32 on a GPU; got ", dtype);
  TORCH_CHECK_VALUE(!compute || *compute == at::kBFloat16 || *compute == at::kHalf,
                    "want compute_dtype bfloat16 or float16; got ", *compute);
}

inline float kept_offset(int64_t n) { return n ? 0.5f * std::log(float(n)) : 0.0f; }  // fastmargin/ops/exponentials.py
inline int64_t pitch_of(int64_t n) { return (n + 63) / 64 * 64; }

// Classes of a chunk: its logits fit an L2 cache, or more of them where the host could not keep up: they are doubled
// until the GPU works on a chunk as long as the host launches it, `seconds`. Counted for B = 4096, d = 512 and a
// backward pass of three products and three kernels, 39 us: 2,048 classes are 37 us of products, 4 us for weights and 4
// us for logits, so C = 1e7 is 4,883 chunks, 0.19 s of launches beside 0.22 s of work. At d = 128 they are 14 us, and
// 8,192 classes, 55 us, are taken.
inline int64_t most_classes(int64_t B, int64_t d, int64_t products, double seconds) {
  const double of_a_class = products * 2.0 * B * d / kFlops + 14.0 * d / kBandwidth + 4.0 * B / kCache;
  int64_t n = std::clamp<int64_t>(kChunkBytes / 4 / std::max({B, d, int64_t(1)}) / 64 * 64, 256, kMostClasses);
  for (int64_t doublings = 0; doublings < kMostDoublings && n * of_a_class < seconds; ++doublings) n *= 2;
  return n;
}

// The weights with one chunk of classes; first and n are 0, and count null, for kernels that access single classes.
inline Classes classes_of(const Operands& in, const int64_t* count, int64_t first, int64_t n) {
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
  Tensor x;               // [B, d]
  // [step, d], [step], [step]; or the cache's, of all classes
  Tensor o, exponent_scale, residual_scale;
  void* stream;
  OperandCache cache;

  // products and seconds: of a chunk, see most_classes.
  ClassChunks(const Operands& given, const optional<at::ScalarType>& compute, int64_t products, double seconds,
              const optional<Tensor>& operands = {}, const optional<Tensor>& scales = {})
      : in(given),
        count(in.class_ids ? at::sum(at::ge(*in.class_ids, 0), at::kLong) : Tensor()),
        type(compute.value_or(at::kFloat)),
        B(in.x.size(0)),
        d(in.x.size(1)),
        C(in.classes()),
        step(std::min(C, most_classes(B, d, products, seconds))),
        x(in.x.to(type)),
        stream(device::stream_of(in.x)),
        cache(operand_cache_of(in.w, in.normalize_weight, type, operands, scales)) {
    TORCH_CHECK_VALUE(!operands || !in.class_ids, "want the operands of all classes, or class_ids, not both");
    const auto options = in.x.options();
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

  // A buffer for the logits of a chunk.
  Tensor workspace() const { return at::empty({B * step}, in.x.options()); }

  // z of a chunk.
  Logits products(const Classes& c, const Tensor& z /* [B step] */) const {
    if (!cache.o)
      check(launch_operands(operand_type(type), c, o.defined() ? o.data_ptr() : nullptr,
                            exponent_scale.data_ptr<float>(), residual_scale.data_ptr<float>(), stream));
    device::multiply(matrix(z, c), x, operands(c).t());
    return {z.data_ptr<float>(), B, in.y.const_data_ptr<int64_t>(), residual_scale.const_data_ptr<float>() + begin(c)};
  }
};

// Into how many products dx = E o is split along the classes (split-K): it has few tiles, too few to keep a GPU busy. A
// power of two, since chunks are multiples of 64 classes.
inline int64_t splits_of(int64_t B, int64_t d) {
  const int64_t tiles = ((B + kTileRows - 1) / kTileRows) * ((d + kTileColumns - 1) / kTileColumns);
  int64_t splits = 1;
  while (2 * splits <= kMostSplits && 2 * splits * tiles <= kMultiprocessors) splits *= 2;
  return splits;
}

// splits += E o; a chunk that is not divisible by the number of splits is added to the first.
inline void add_row_products(const Tensor& splits /* [s, B, d] */, const Tensor& e /* [B, n] */,
                             const Tensor& o /* [n, d] */) {
  const int64_t n = e.size(1), s = n % splits.size(0) ? 1 : splits.size(0), part = n / s;
  device::multiply_add(splits.narrow(0, 0, s), e.as_strided({s, e.size(0), part}, {part, e.stride(0), 1}),
                       o.as_strided({s, part, o.size(1)}, {part * o.stride(0), o.stride(0), 1}));
}

}  // namespace fastmargin::cuda
