// nontarget_lse on a GPU, the forward pass: checks, allocation, and the loop over chunks of classes.
//
//   per chunk   o = operands, made now or taken from the cache;  z = x o^T;  sums and the k best, row by row
//   kept        E of the chunk is stored, too, and expected_weight += E o in splits of the chunk
//
// Matrix products are ATen's, all else is in nontarget_lse.cu. The host never waits for the device, so a CUDA graph can
// be captured. Beside the results, memory is needed for one chunk: 256 classes at least. Formulas:
// fastmargin/ops/nontarget_lse.py and exponentials.py. Letters: B rows, n classes of a chunk, d, k.
#include <ATen/ops/full.h>
#include <ATen/ops/isneginf.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/zeros.h>

#include "../tile.h"
#include "nontarget_lse_chunks.h"

namespace fastmargin::cuda {

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
                                                                     optional<at::ScalarType> compute_dtype,
                                                                     bool need_expected_weight,
                                                                     const optional<Tensor>& operands,  // [C, d]
                                                                     const optional<Tensor>& scales,    // [2, C]
                                                                     bool keep_exponentials) {
  const Operands in = checked_layout(x, w, y, bias, class_ids, normalize_weight);
  refuse(bend, pool);
  check_types(x.scalar_type(), compute_dtype);
  TORCH_CHECK_VALUE(topk >= 0, "topk = ", topk, "; want 0 or more");
  TORCH_CHECK_VALUE(!keep_exponentials || (normalize_weight && compute_dtype != at::kHalf),
                    "keep_exponentials: want normalized weights, and bfloat16 or float32 operands");
  const c10::DeviceGuard guard(x.device());
  const bool sums_dx = keep_exponentials && need_expected_weight;
  const double seconds = 2 * kLaunch + (sums_dx ? 2 : 1) * kProduct;
  const ClassChunks chunks(in, compute_dtype, sums_dx ? 2 : 1, seconds, operands, scales);
  const auto options = in.x.options();
  const int64_t B = chunks.B, parts = parts_of(B), pitch = pitch_of(chunks.C);
  const float offset = kept_offset(chunks.C);
  const auto list = [&](at::IntArrayRef sizes) {
    return std::pair(at::full(sizes, -INFINITY, options), at::full(sizes, -1, options.dtype(at::kLong)));
  };
  Tensor shift = at::full({B, parts}, keep_exponentials ? offset : kNoShift, options),
         sum = at::zeros({B, parts}, options);
  auto [part_values, part_classes] = list({B, parts, topk});
  const RowState state{shift.data_ptr<float>(), sum.data_ptr<float>(), part_values.data_ptr<float>(),
                       part_classes.data_ptr<int64_t>(), topk};
  const Tensor z = chunks.workspace(), e = at::empty({keep_exponentials ? B : 0, pitch}, options.dtype(chunks.type));
  const Tensor splits = at::zeros({sums_dx ? splits_of(B, chunks.d) : 0, B, chunks.d}, options);
  for (int64_t first = 0; first < chunks.C && B; first += chunks.step) {
    const Classes c = chunks.classes(first);
    const Logits products = chunks.products(c, z);
    if (!keep_exponentials) {
      check(launch_nontarget_lse_fwd(products, c, state, chunks.stream));
      continue;
    }
    check(launch_nontarget_lse_keep(operand_type(chunks.type), products, c, state, offset, {e.data_ptr(), pitch},
                                    chunks.stream));
    if (sums_dx) add_row_products(splits, e.narrow(1, first, c.n), chunks.operands(c));
  }
  Tensor rest = at::empty({B}, options);
  auto [values, classes] = list({B, topk});
  check(launch_merge_parts(state, B, rest.data_ptr<float>(), values.data_ptr<float>(), classes.data_ptr<int64_t>(),
                           chunks.stream));
  Tensor expected_weight = sums_dx ? at::zeros({B, chunks.d}, options) : at::empty({0}, options);
  if (sums_dx) {
    const Tensor scale = at::rsub(rest, offset).exp().masked_fill(at::isneginf(rest), 0);
    check(launch_add_splits(splits.const_data_ptr<float>(), splits.size(0), B, chunks.d, scale.const_data_ptr<float>(),
                            expected_weight.data_ptr<float>(), chunks.stream));
  }
  return {rest, values, classes, expected_weight, keep_exponentials ? e : at::empty({0}, e.options())};
}

}  // namespace fastmargin::cuda
