// pairwise_potential on a GPU: checks, allocation, and the loop over waves of pairs whose products stay in the L2
// cache.
//
//   per wave of rows and columns:   u = a b^T, of points less the mean of b;   u becomes -2 phi', potentials are
//   summed; slope_a += u b;   and per rows, after their last wave:   slope_a += (sum_j 2 phi') a
//
// Matrix products are ATen's, in float32 throughout; all else is in pairwise_potential.cu. Nothing waits for the
// device, so a graph can be captured: hence no product is left out for want of an active pair, which the host would
// have to ask for. The memory beside the results is that of one wave. One side (b is a) is computed like two, every
// pair from both its ends: half the work cannot be had without sums that blocks share. Formulas:
// fastmargin/ops/pairwise_potential.py.
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "../check.h"
#include "device.h"
#include "glue.h"
#include "launch.h"

namespace fastmargin::cuda {
namespace {

constexpr int64_t kNumbers = kWaveBytes / 4;    // of a wave, at most
constexpr int64_t kMostRows = kNumbers / 1024;  // at least 1024 columns: few products with long sums
constexpr int64_t kMostColumns = 1 << 14;       // few long rows keep few multiprocessors busy
constexpr int64_t kLeastColumns = 64;

// One side: the points as the caller gave them, and room for those of a wave.
struct Side {
  Tensor given, ids;        // [n, d], [n]
  optional<Tensor> weight;  // [n]
  int64_t step;             // points of a wave, at most
  Tensor centred, squares;  // [step, d], [step]

  Side(const Tensor& points, const Tensor& point_ids, const optional<Tensor>& weights, int64_t points_of_wave)
      : given(points),
        ids(point_ids),
        weight(weights),
        step(points_of_wave),
        centred(at::empty({step, points.size(1)}, points.options())),
        squares(at::empty({step}, points.options())) {}

  // The points of a wave from `first` on, less the mean.
  Points load(int64_t first, const Tensor& mean /* [d] */, void* stream) const {
    const int64_t n = std::min(step, given.size(0) - first), d = given.size(1);
    const float* points = given.const_data_ptr<float>() + first * d;
    check(launch_centre(points, mean.const_data_ptr<float>(), n, d, centred.data_ptr<float>(),
                        squares.data_ptr<float>(), stream));
    return {points,
            ids.const_data_ptr<int64_t>() + first,
            weight ? weight->const_data_ptr<float>() + first : nullptr,
            centred.const_data_ptr<float>(),
            squares.const_data_ptr<float>(),
            n,
            d};
  }
};

// The checked arguments, contiguous.
struct Pairs {
  Tensor a, b, a_ids, b_ids;
  optional<Tensor> b_weight;

  Pairs(const Tensor& a_, const Tensor& b_, const Tensor& a_ids_, const Tensor& b_ids_,
        const optional<Tensor>& b_weight_) {
    TORCH_CHECK_VALUE(a_.dim() == 2 && b_.dim() == 2 && a_.size(1) == b_.size(1) && a_.size(1) > 0,
                      "want a [N, d], b [M, d]; got ", a_.sizes(), ", ", b_.sizes());
    const at::Device device = a_.device();
    a = checked_like("a", a_, a_.sizes(), at::kFloat, device);
    b = checked_like("b", b_, b_.sizes(), at::kFloat, device);
    a_ids = checked_like("a_ids", a_ids_, {a.size(0)}, at::kLong, device);
    b_ids = checked_like("b_ids", b_ids_, {b.size(0)}, at::kLong, device);
    if (b_weight_) b_weight = checked_like("b_weight", *b_weight_, {b.size(0)}, at::kFloat, device);
  }

  // Of a wave. Its products, and its points of either side, are kNumbers at most; 64 columns at least.
  int64_t rows() const { return std::min(a.size(0), std::clamp<int64_t>(kNumbers / a.size(1), 1, kMostRows)); }
  int64_t columns() const {
    const int64_t fit = kNumbers / std::max(rows(), a.size(1)) / kLeastColumns * kLeastColumns;
    return std::min(b.size(0), std::clamp(fit, kLeastColumns, kMostColumns));
  }
};

template <typename Phi>
std::tuple<Tensor, Tensor> forward(const Phi& phi, const Pairs& in, bool want_slope) {
  const device::NoTf32 guard;
  const int64_t N = in.a.size(0), M = in.b.size(0), d = in.a.size(1);
  const auto options = in.a.options();
  const Side a(in.a, in.a_ids, std::nullopt, in.rows()), b(in.b, in.b_ids, in.b_weight, in.columns());
  const Tensor mean = at::mean(in.b, 0), u = at::empty({a.step * b.step}, options);
  const Tensor sums = at::zeros({2, N}, options.dtype(at::kDouble));
  Tensor potential = at::empty({N}, options), slope = want_slope ? at::zeros({N, d}, options) : at::empty({0}, options);
  void* stream = device::stream_of(in.a);
  for (int64_t i = 0; i < N; i += a.step) {
    const Points rows = a.load(i, mean, stream);
    const PairSums state{sums.data_ptr<double>() + i, sums.data_ptr<double>() + N + i,
                         want_slope ? slope.data_ptr<float>() + i * d : nullptr};
    for (int64_t j = 0; j < M; j += b.step) {
      const Points columns = b.load(j, mean, stream);
      const Tensor products = u.narrow(0, 0, rows.n * columns.n).view({rows.n, columns.n});
      const Tensor points = b.centred.narrow(0, 0, columns.n);
      device::multiply(products, a.centred.narrow(0, 0, rows.n), points.t());
      check(launch_pairwise_potential(phi, rows, columns, products.data_ptr<float>(), state, stream));
      if (want_slope)
        device::multiply_add(slope.narrow(0, i, rows.n).unsqueeze(0), products.unsqueeze(0), points.unsqueeze(0));
    }
    check(launch_pair_sums(rows, state, potential.data_ptr<float>() + i, stream));
  }
  return {potential, slope};
}

}  // namespace

std::tuple<Tensor, Tensor> pairwise_potential_fwd(const Tensor& a,                   // [N, d]
                                                  const Tensor& b,                   // [M, d]
                                                  const Tensor& a_ids,               // [N]
                                                  const Tensor& b_ids,               // [M]
                                                  const optional<Tensor>& b_weight,  // [M]
                                                  c10::string_view kind, double margin, bool, bool want_slope) {
  TORCH_CHECK_VALUE(kind == "inverse" || kind == "hinge", "kind = ", kind, ": want inverse or hinge");
  const Pairs in(a, b, a_ids, b_ids, b_weight);
  const c10::DeviceGuard guard(a.device());
  return kind == "hinge" ? forward(Hinge{margin}, in, want_slope) : forward(Inverse(), in, want_slope);
}

}  // namespace fastmargin::cuda
