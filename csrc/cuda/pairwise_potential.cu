// pairwise_potential on a GPU: the kernels around the matrix products of one chunk of pairs
// (pairwise_potential_glue.cpp has the loop over chunks).
//
//   center     a'_i = a_i - mean and |a'_i|^2, for b likewise                              a warp per row
//   potential  u_ij = |a'_i|^2 + |b'_j|^2 - 2 <a'_i, b'_j> becomes -2 phi'(u_ij) weight_j; sums of phi and 2 phi', and
//              the slopes of near pairs                                                    a block per row
//   sums       slope_i += (sum_j 2 phi') a'_i                                              a warp per row
//
// Near pairs are few. A block reads its row in spans of columns. If a span has near pairs, the whole block computes
// them one by one, in the order of their columns, from the difference of the points as given. A row is handled by one
// block in every chunk, and chunks follow each other on the stream: no sum is shared, nothing is atomic, and runs
// repeat bit for bit.
#include "block.cuh"
#include "launch.h"

namespace fastmargin {
namespace {

constexpr int kAtOnce = 4;                 // columns of a thread in a span: loads in flight
constexpr int kSpan = kAtOnce * kThreads;  // columns of a span
constexpr int kWords = kAtOnce * kWarps;   // of 32 bits: one bit per column of a span
constexpr unsigned kAllLanes = 0xffffffffu;

struct Plus {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

__global__ void center_kernel(const float* given /* [n, d] */, const float* mean /* [d] */, int64_t n, int64_t d,
                              float* centered /* [n, d] */, float* squares /* [n] */) {
  const int64_t i = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (i >= n) return;
  float sum = 0;
  for (int64_t f = lane; f < d; f += kWarp) {
    const float v = given[i * d + f] - mean[f];
    centered[i * d + f] = v;
    sum += v * v;
  }
  sum = over_warp(sum, Plus());
  if (lane == 0) squares[i] = sum;
}

__device__ inline float weight_of(const Points& b, int64_t j) { return b.weight ? b.weight[j] : 1.0f; }

// u: the squared distances from row i to this thread's columns of a span; infinite for pairs that do not count or are
// near. close: a bit for each near pair. Returns whether this thread has near pairs.
__device__ inline bool measure(const Points& a, const Points& b, int64_t i, int64_t first,
                               const float* products /* [b.n] */, float (&u)[kAtOnce], unsigned* close /* [kWords] */) {
  bool any = false;
#pragma unroll
  for (int l = 0; l < kAtOnce; ++l) {
    const int64_t j = first + l * kThreads + threadIdx.x;
    u[l] = INFINITY;
    bool is_near = false;
    if (j < b.n && b.id[j] != a.id[i]) {
      const float squares = a.squares[i] + b.squares[j], v = squares - 2.0f * products[j];
      is_near = near(v, squares);
      if (!is_near) u[l] = v;
    }
    any |= is_near;
    const unsigned bits = __ballot_sync(kAllLanes, is_near);
    if (threadIdx.x % kWarp == 0) close[l * kWarps + threadIdx.x / kWarp] = bits;
  }
  return any;
}

// Adds the slope of one near pair, computed from the difference of its points; the threads of the block share the
// features. Returns its potential, in every thread.
template <typename Phi>
__device__ inline float add_near(const Phi& phi, const Points& a, const Points& b, int64_t i, int64_t j,
                                 float* slope /* [d] or null */, float* scratch /* [kWarps] */) {
  const float *from = a.given + i * a.d, *to = b.given + j * a.d, weight = weight_of(b, j);
  float u = 0;
  for (int64_t f = threadIdx.x; f < a.d; f += kThreads) u += (from[f] - to[f]) * (from[f] - to[f]);
  const Potential<float> p = phi.at(over_block(u, scratch, Plus()));
  for (int64_t f = threadIdx.x; slope && p.coefficient != 0 && f < a.d; f += kThreads)
    slope[f] += p.coefficient * weight * (from[f] - to[f]);
  __syncthreads();  // scratch may be used again
  return p.value * weight;
}

template <typename Phi>
__global__ void pairwise_potential_kernel(Phi phi, Points a, Points b, float* products /* [a.n, b.n] */,
                                          PairSums sums) {
  __shared__ unsigned close[kWords];
  __shared__ float scratch[kWarps], other_scratch[kWarps];
  const int64_t i = blockIdx.x;
  float* row = products + i * b.n;
  float* slope = sums.slope ? sums.slope + i * a.d : nullptr;
  float potential = 0, near_potential = 0, coefficient = 0;
  for (int64_t first = 0; first < b.n; first += kSpan) {
    float u[kAtOnce];
    const bool any = measure(a, b, i, first, row, u, close);
    if (__syncthreads_or(any)) {
      for (int w = 0; w < kWords; ++w)
        for (unsigned bits = close[w]; bits != 0; bits &= bits - 1)
          near_potential += add_near(phi, a, b, i, first + w * kWarp + __ffs(bits) - 1, slope, scratch);
      __syncthreads();  // all threads have read the bits before the next span overwrites them
    }
#pragma unroll
    for (int l = 0; l < kAtOnce; ++l) {
      const int64_t j = first + l * kThreads + threadIdx.x;
      if (j >= b.n) break;
      const Potential<float> p = phi.at(u[l]);
      const float weight = weight_of(b, j);
      potential += p.value * weight;
      coefficient += p.coefficient * weight;
      if (slope) row[j] = -p.coefficient * weight;
    }
  }
  potential = over_block(potential, scratch, Plus());
  coefficient = over_block(coefficient, other_scratch, Plus());
  if (threadIdx.x == 0) {
    sums.potential[i] += double(potential) + double(near_potential);
    sums.coefficient[i] += double(coefficient);
  }
}

__global__ void pair_sums_kernel(Points a, PairSums sums, float* potential /* [n] */) {
  const int64_t i = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (i >= a.n) return;
  const float coefficient = static_cast<float>(sums.coefficient[i]), total = static_cast<float>(sums.potential[i]);
  if (lane == 0) potential[i] = total;
  // A row none of whose pairs counts has slope 0, even if its own features are NaN; a sum that is NaN is added.
  const bool add = sums.slope && (coefficient != 0 || total != 0);
  for (int64_t f = lane; add && f < a.d; f += kWarp) sums.slope[i * a.d + f] += coefficient * a.centered[i * a.d + f];
}

}  // namespace

int launch_center(const float* given, const float* mean, int64_t n, int64_t d, float* centered, float* squares,
                  void* stream) {
  return launch(center_kernel, blocks_of(n), stream, given, mean, n, d, centered, squares);
}

int launch_pairwise_potential(const Inverse& phi, const Points& a, const Points& b, float* u, const PairSums& sums,
                              void* stream) {
  return launch(pairwise_potential_kernel<Inverse>, a.n, stream, phi, a, b, u, sums);
}

int launch_pairwise_potential(const Hinge& phi, const Points& a, const Points& b, float* u, const PairSums& sums,
                              void* stream) {
  return launch(pairwise_potential_kernel<Hinge>, a.n, stream, phi, a, b, u, sums);
}

int launch_pair_sums(const Points& a, const PairSums& sums, float* potential, void* stream) {
  return launch(pair_sums_kernel, blocks_of(a.n), stream, a, sums, potential);
}

}  // namespace fastmargin
