// pairwise_potential on the CPU. The formulas are in fastmargin/ops/pairwise_potential.py.
//
//   per tile of rows a and columns b:   u = a b^T, the mean of b subtracted from both;  then, row by row in cache,
//   u becomes -2 phi' and the potentials are summed;  slope_a += (sum_j 2 phi') a + u b;  and likewise for b if b is a
//
// Points are divided into blocks of at most kSide, blocks into strips of at most kStrip. Two sides: a thread owns
// strips of rows and iterates over all columns. One side (b is a): the pairs of strips are scheduled as the games of a
// round-robin tournament. Every two strips meet once, and no strip plays twice in a round, so that a thread may write
// to both strips of its game. Either way no sum is shared, nothing is locked, and runs repeat bit for bit.
#include <ATen/Parallel.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <string_view>
#include <tuple>
#include <vector>

#include "../check.h"
#include "gemm.h"
#include "pairwise_potential_kernel.h"

namespace fastmargin {

namespace {

using at::Tensor;
using std::optional;

constexpr int64_t kStrip = 4;  // blocks

// The points of one side, and their results.
template <typename T>
struct Points {
  Tensor points;            // [n, d] contiguous
  std::vector<int32_t> id;  // [padded] codes of the ids
  std::vector<T> weight;    // [padded]
  std::vector<double> potential;
  Tensor slope;  // [padded, d], undefined where not needed
  int64_t n, d;

  Points(const Tensor& given, const Tensor& codes /* [n] int32 */, const optional<Tensor>& weights, bool want_slope)
      : points(given.contiguous()),
        id(padded_count(given.size(0))),
        weight(padded_count(given.size(0)), T(1)),
        potential(given.size(0)),
        n(given.size(0)),
        d(given.size(1)) {
    std::copy_n(codes.const_data_ptr<int32_t>(), n, id.begin());
    if (weights) std::copy_n(weights->contiguous().template const_data_ptr<T>(), n, weight.begin());
    if (want_slope) slope = at::zeros({padded_count(n), d}, points.options());
  }
};

// A thread's copy of consecutive points, the mean subtracted, in blocks of at most kSide.
template <typename T>
class Strip {
 public:
  Strip(int64_t block, int64_t capacity, int64_t d, bool need_transposed)
      : block_(block), centered_(capacity * d), transposed_(need_transposed ? capacity * d : 0), squares_(capacity) {}

  void load(const PairKernels<T>& kernels, Points<T>& all, const T* mean, int64_t first, int64_t last) {
    const int64_t d = all.d;
    sides.clear();
    for (int64_t i = first; i < last; i += block_) {
      const int64_t at = i - first, n = std::min(block_, last - i), padded = padded_count(n);
      T* transposed = transposed_.empty() ? nullptr : transposed_.data() + at * d;
      Side<T> side{all.points.template const_data_ptr<T>() + i * d,
                   centered_.data() + at * d,
                   transposed,
                   squares_.data() + at,
                   all.id.data() + i,
                   all.weight.data() + i,
                   n,
                   padded,
                   all.potential.data() + i,
                   all.slope.defined() ? all.slope.template data_ptr<T>() + i * d : nullptr};
      kernels.center(side.points, mean, n, padded, d, centered_.data() + at * d, transposed, squares_.data() + at);
      sides.push_back(side);
    }
  }

  std::vector<Side<T>> sides;

 private:
  int64_t block_;
  std::vector<T> centered_, transposed_, squares_;
};

// A thread's buffers for one tile.
template <typename T>
struct Workspace {
  std::vector<T> u, transposed, row, col;
  explicit Workspace(int64_t block) : u(block * block), transposed(block * block), row(block), col(block) {}
};

template <typename T, typename Phi>
struct Sweep {
  const Phi phi;
  const int64_t d;
  const T* mean;  // [d]
  const PairKernels<T>& kernels = pair_kernels<T>();

  void tile(const Side<T>& a, const Side<T>& b, bool both, Workspace<T>& workspace) const {
    T* u = workspace.u.data();
    CoefficientSums<T> sums{workspace.row.data(), workspace.col.data(), false};
    gemm(a.padded, b.padded, d, a.centered, d, b.transposed, b.padded, u, b.padded, false);
    kernels.sweep(phi, a, b, d, both, u, sums);
    if (a.slope == nullptr || !sums.active) return;
    kernels.add_scaled(sums.row, a.centered, a.n, d, a.slope);
    gemm(a.padded, d, b.padded, u, b.padded, b.centered, d, a.slope, d, true);
    if (!both) return;
    kernels.transpose(u, a.padded, b.padded, a.padded, workspace.transposed.data());
    kernels.add_scaled(sums.col, b.centered, b.n, d, b.slope);
    gemm(b.padded, d, a.padded, workspace.transposed.data(), a.padded, a.centered, d, b.slope, d, true);
  }

  // Every row of a with every column of b.
  void two_sides(Points<T>& a, Points<T>& b) const {
    const int64_t threads = at::get_num_threads();
    const int64_t block = side_of(a.n, threads), step = block * strip_of(a.n, block, threads);
    at::parallel_for(0, at::divup(a.n, step), 1, [&](int64_t begin, int64_t end) {
      Strip<T> rows(block, step, d, false), columns(kSide, kSide, d, true);
      Workspace<T> workspace(kSide);
      for (int64_t i = begin * step; i < std::min(end * step, a.n); i += step) {
        rows.load(kernels, a, mean, i, std::min(i + step, a.n));
        for (int64_t j = 0; j < b.n; j += kSide) {
          columns.load(kernels, b, mean, j, std::min(j + kSide, b.n));
          for (const auto& row : rows.sides) tile(row, columns.sides[0], false, workspace);
        }
      }
    });
  }

  // Every pair of points of a once; tiles on the diagonal are computed whole, so their pairs from both ends.
  void one_side(Points<T>& a) const {
    const int64_t threads = at::get_num_threads();
    const int64_t block = side_of(a.n, 2 * threads), step = block * strip_of(a.n, block, 2 * threads);
    const int64_t strips = at::divup(a.n, step), players = strips + strips % 2;
    for (int64_t round = 0; round < players; ++round)
      at::parallel_for(0, players / 2, 1, [&](int64_t begin, int64_t end) {
        Strip<T> rows(block, step, d, true), columns(block, step, d, true);
        Workspace<T> workspace(kSide);
        for (int64_t game = begin; game < end; ++game) {
          const auto [one, two] = opponents(game, round, players);
          if (round == 0) {
            for (int64_t s : {one, two})
              if (s < strips) within_strip(a, s * step, step, rows, workspace);
          } else if (two < strips) {
            between_strips(a, one * step, two * step, step, rows, columns, workspace);
          }
        }
      });
  }

  // The two strips of one game, the smaller first. Round 0 is for each strip by itself. From round 1 on, the last
  // player keeps its place and the others rotate (the circle method).
  static std::tuple<int64_t, int64_t> opponents(int64_t game, int64_t round, int64_t players) {
    const int64_t others = players - 1;
    if (round == 0) return {2 * game, 2 * game + 1};
    const int64_t one = (round + game) % others, two = game == 0 ? others : (round + others - game) % others;
    return std::minmax(one, two);
  }

  void within_strip(Points<T>& a, int64_t first, int64_t step, Strip<T>& strip, Workspace<T>& workspace) const {
    strip.load(kernels, a, mean, first, std::min(first + step, a.n));
    for (size_t j = 0; j < strip.sides.size(); ++j)
      for (size_t i = 0; i <= j; ++i) tile(strip.sides[i], strip.sides[j], i < j, workspace);
  }

  void between_strips(Points<T>& a, int64_t one, int64_t two, int64_t step, Strip<T>& rows, Strip<T>& columns,
                      Workspace<T>& workspace) const {
    rows.load(kernels, a, mean, one, std::min(one + step, a.n));
    columns.load(kernels, a, mean, two, std::min(two + step, a.n));
    for (const auto& column : columns.sides)
      for (const auto& row : rows.sides) tile(row, column, true, workspace);
  }

  // Points on the side of a tile, so few that all threads have tiles, if there are enough points.
  static int64_t side_of(int64_t n, int64_t parts) {
    return std::min(kSide, std::max(kPad, padded_count(at::divup(n, parts))));
  }
  static int64_t strip_of(int64_t n, int64_t block, int64_t parts) {
    return std::min(kStrip, std::max<int64_t>(1, n / (block * parts)));
  }
};

template <typename T>
std::tuple<Tensor, Tensor> results(const Points<T>& a) {
  const auto options = a.points.options();
  Tensor potential = at::empty({a.n}, options);
  std::copy(a.potential.begin(), a.potential.end(), potential.data_ptr<T>());
  return {potential, a.slope.defined() ? a.slope.narrow(0, 0, a.n) : at::empty({0}, options)};
}

// Ids are only compared for equality: each becomes its index among the distinct ids, which fits 32 bits.
Tensor codes_of(const Tensor& ids) { return std::get<1>(at::_unique2(ids, false, true)).to(at::kInt); }

template <typename T, typename Phi>
std::tuple<Tensor, Tensor> among_themselves(const Phi& phi, const Tensor& a, const Tensor& a_ids, bool want_slope) {
  const Tensor mean = at::mean(a, 0);
  Points<T> points(a, codes_of(a_ids), std::nullopt, want_slope);
  Sweep<T, Phi>{phi, a.size(1), mean.const_data_ptr<T>()}.one_side(points);
  return results(points);
}

template <typename T, typename Phi>
std::tuple<Tensor, Tensor> between(const Phi& phi, const Tensor& a, const Tensor& b, const Tensor& a_ids,
                                   const Tensor& b_ids, const optional<Tensor>& b_weight, bool want_slope) {
  const Tensor mean = at::mean(b, 0), codes = codes_of(at::cat({a_ids, b_ids}));
  Points<T> rows(a, codes.narrow(0, 0, a.size(0)), std::nullopt, want_slope);
  Points<T> columns(b, codes.narrow(0, a.size(0), b.size(0)), b_weight, false);
  Sweep<T, Phi>{phi, a.size(1), mean.const_data_ptr<T>()}.two_sides(rows, columns);
  return results(rows);
}

std::tuple<Tensor, Tensor> pairwise_potential_fwd(const Tensor& a,                   // [N, d]
                                                  const optional<Tensor>& b,         // [M, d]
                                                  const Tensor& a_ids,               // [N]
                                                  const optional<Tensor>& b_ids,     // [M]
                                                  const optional<Tensor>& b_weight,  // [M]
                                                  c10::string_view kind, double margin, bool want_slope) {
  const Pairs in(a, b, a_ids, b_ids, b_weight);
  TORCH_CHECK_VALUE(kind == "inverse" || kind == "hinge", "kind = ", kind, ": want inverse or hinge");
  return dispatch(a.scalar_type(), [&](auto t) {
    using T = decltype(t);
    const auto run = [&](const auto& phi) {
      return in.one_side ? among_themselves<T>(phi, in.a, in.a_ids, want_slope)
                         : between<T>(phi, in.a, in.b, in.a_ids, in.b_ids, in.b_weight, want_slope);
    };
    return kind == "hinge" ? run(Hinge{margin}) : run(Inverse());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(fastmargin, CPU, m) { m.impl("pairwise_potential_fwd", pairwise_potential_fwd); }

}  // namespace fastmargin
