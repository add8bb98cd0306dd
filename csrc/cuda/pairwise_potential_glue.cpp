// pairwise_potential on a GPU: checks, allocation, and the loop over chunks of pairs whose products fit an L2 cache.
//
//   a chunk of rows and columns   u = a b^T, the mean of b subtracted from both;  u becomes -2 phi', potentials are
//                                 summed;  slope_a += u b
//   after a row's last chunk      slope_a += (sum_j 2 phi') a
//
// Matrix products are ATen's, in float32 whatever torch is set to; all else is in pairwise_potential.cu. The host never
// waits for the device, so a CUDA graph can be captured. Hence no product is skipped where all 2 phi' are 0: the host
// cannot know. Beside the results, memory is needed for one chunk. One side (b is a) is computed like two: sharing the
// products of u would save a quarter of the arithmetic, but u would be read a second time for the sums of its columns.
// Formulas: fastmargin/ops/pairwise_potential.py. Letters: N and M points, d features.
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>

#include "../check.h"
#include "device.h"
#include "launch.h"
#include "ops.h"

namespace fastmargin::cuda {
namespace {

constexpr int64_t kNumbers = kChunkBytes / 4;   // of a chunk, at most
constexpr int64_t kMostRows = kNumbers / 1024;  // leaves at least 1024 columns: few products with long sums
constexpr int64_t kMostColumns = 1 << 14;       // blocks of few long rows leave a GPU idle
constexpr int64_t kLeastColumns = 64;

// One side: all points as the caller gave them, and the points of a chunk.
struct Side {
  Tensor given, ids;        // [n, d], [n]
  optional<Tensor> weight;  // [n]
  Tensor mean;              // [d]
  int64_t step;             // points of a chunk, at most
  void* stream;
  Tensor workspace, squares;  // [step, d] for the centered points, [step]
  Points chunk = {};

  Side(const Tensor& points, const Tensor& point_ids, const optional<Tensor>& weights, const Tensor& b_mean,
       int64_t points_of_chunk)
      : given(points),
        ids(point_ids),
        weight(weights),
        mean(b_mean),
        step(points_of_chunk),
        stream(device::stream_of(points)),
        workspace(at::empty({step, points.size(1)}, points.options())),
        squares(at::empty({step}, points.options())) {}

  void load(int64_t first) {
    const int64_t n = std::min(step, given.size(0) - first), d = given.size(1);
    chunk = {given.const_data_ptr<float>() + first * d,
             ids.const_data_ptr<int64_t>() + first,
             weight ? weight->const_data_ptr<float>() + first : nullptr,
             workspace.const_data_ptr<float>(),
             squares.const_data_ptr<float>(),
             n,
             d};
    check(launch_center(chunk.given, mean.const_data_ptr<float>(), n, d, workspace.data_ptr<float>(),
                        squares.data_ptr<float>(), stream));
  }

  Tensor centered() const { return workspace.narrow(0, 0, chunk.n); }  // [chunk.n, d]
};

// Rows and columns of a chunk: its products, and its points of either side, are kNumbers at most; 64 columns at least.
int64_t rows_of(const Pairs& in) {
  return std::min(in.a.size(0), std::clamp<int64_t>(kNumbers / in.a.size(1), 1, kMostRows));
}
int64_t columns_of(const Pairs& in) {
  const int64_t fit = kNumbers / std::max(rows_of(in), in.a.size(1)) / kLeastColumns * kLeastColumns;
  return std::min(in.b.size(0), std::clamp(fit, kLeastColumns, kMostColumns));
}

template <typename Phi>
void add_chunk(const Phi& phi, const Side& a, const Side& b, const Tensor& workspace /* [a.step b.step] */,
               const PairSums& sums, const Tensor& slope /* [a.chunk.n, d], undefined where not needed */) {
  const Tensor u = workspace.narrow(0, 0, a.chunk.n * b.chunk.n).view({a.chunk.n, b.chunk.n});
  device::multiply(u, a.centered(), b.centered().t());
  check(launch_pairwise_potential(phi, a.chunk, b.chunk, u.data_ptr<float>(), sums, a.stream));
  if (slope.defined()) device::multiply_add(slope.unsqueeze(0), u.unsqueeze(0), b.centered().unsqueeze(0));
}

template <typename Phi>
std::tuple<Tensor, Tensor> forward(const Phi& phi, const Pairs& in, bool want_slope) {
  const device::NoTf32 guard;
  const int64_t N = in.a.size(0), M = in.b.size(0), d = in.a.size(1);
  const auto options = in.a.options();
  const Tensor mean = at::mean(in.b, 0), sums = at::zeros({2, N}, options.dtype(at::kDouble));
  Side a(in.a, in.a_ids, std::nullopt, mean, rows_of(in)), b(in.b, in.b_ids, in.b_weight, mean, columns_of(in));
  const Tensor workspace = at::empty({a.step * b.step}, options);
  Tensor potential = at::empty({N}, options), slope = want_slope ? at::zeros({N, d}, options) : at::empty({0}, options);
  for (int64_t i = 0; i < N; i += a.step) {
    a.load(i);
    const Tensor rows = want_slope ? slope.narrow(0, i, a.chunk.n) : Tensor();
    const PairSums state{sums.data_ptr<double>() + i, sums.data_ptr<double>() + N + i,
                         want_slope ? rows.data_ptr<float>() : nullptr};
    for (int64_t j = 0; j < M; j += b.step) {
      b.load(j);
      add_chunk(phi, a, b, workspace, state, rows);
    }
    check(launch_pair_sums(a.chunk, state, potential.data_ptr<float>() + i, a.stream));
  }
  return {potential, slope};
}

}  // namespace

std::tuple<Tensor, Tensor> pairwise_potential_fwd(const Tensor& a,                   // [N, d]
                                                  const optional<Tensor>& b,         // [M, d]
                                                  const Tensor& a_ids,               // [N]
                                                  const optional<Tensor>& b_ids,     // [M]
                                                  const optional<Tensor>& b_weight,  // [M]
                                                  c10::string_view kind, double margin, bool want_slope) {
  TORCH_CHECK_VALUE(kind == "inverse" || kind == "hinge", "kind = ", kind, ": want inverse or hinge");
  TORCH_CHECK_VALUE(a.scalar_type() == at::kFloat, "want a of float32; got ", a.scalar_type());
  const Pairs in(a, b, a_ids, b_ids, b_weight);
  const c10::DeviceGuard guard(a.device());
  return kind == "hinge" ? forward(Hinge{margin}, in, want_slope) : forward(Inverse(), in, want_slope);
}

}  // namespace fastmargin::cuda
