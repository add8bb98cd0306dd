// pairwise_potential on a GPU: what stands around the matrix products of one wave of pairs (pairwise_potential_glue.cpp
// has the loop).
//
//   centre     a'_i = a_i - mean and |a'_i|^2, for b likewise                              a warp a row
//   potential  u_ij = |a'_i|^2 + |b'_j|^2 - 2 <a'_i, b'_j> becomes -2 phi'(u_ij) weight_j; sums of phi and 2 phi', and
//              the slopes of near pairs                                                    a block a row
//   sums       slope_i += (sum_j 2 phi') a'_i                                              a warp a row
//
// Near pairs are few. A row is read in chunks; where a chunk has one, the whole block takes its near pairs one by one,
// in the order of their columns, by the difference of the rows as given. A row belongs to one block in every wave, and
// waves follow each other on the stream: no sum is shared, nothing is atomic, and a run repeats bit for bit.
#include "block.cuh"
#include "launch.h"

namespace fastmargin {
namespace {

constexpr int kAtOnce = 4;                  // columns of a thread in a chunk: loads in flight
constexpr int kChunk = kAtOnce * kThreads;  // columns
constexpr int kWords = kAtOnce * kWarps;    // of a bit per column of a chunk
constexpr unsigned kAllLanes = 0xffffffffu;

struct Plus {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

__global__ void centre_kernel(const float* given /* [n, d] */, const float* mean /* [d] */, int64_t n, int64_t d,
                              float* centred /* [n, d] */, float* squares /* [n] */) {
  const int64_t i = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (i >= n) return;
  float sum = 0;
  for (int64_t f = lane; f < d; f += kWarp) {
    const float v = given[i * d + f] - mean[f];
    centred[i * d + f] = v;
    sum += v * v;
  }
  sum = over_warp(sum, Plus());
  if (lane == 0) squares[i] = sum;
}

__device__ inline float weight_of(const Points& b, int64_t j) { return b.weight ? b.weight[j] : 1.0f; }

// The squared distances from row i to this thread's columns of a chunk: infinite for those that do not count or are
// near; `close` has a bit for each near one. Whether this thread has any.
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

// One near pair, by its difference; the block shares the features. Its potential, in every thread.
template <typename Phi>
__device__ inline float add_near(const Phi& phi, const Points& a, const Points& b, int64_t i, int64_t j,
                                 float* slope /* [d] or null */, float* room /* [kWarps] */) {
  const float *from = a.given + i * a.d, *to = b.given + j * a.d, weight = weight_of(b, j);
  float u = 0;
  for (int64_t f = threadIdx.x; f < a.d; f += kThreads) u += (from[f] - to[f]) * (from[f] - to[f]);
  const Potential<float> p = phi.at(over_block(u, room, Plus()));
  for (int64_t f = threadIdx.x; slope && p.slope != 0 && f < a.d; f += kThreads)
    slope[f] += p.slope * weight * (from[f] - to[f]);
  __syncthreads();  // the room is free again
  return p.value * weight;
}

template <typename Phi>
__global__ void pairwise_potential_kernel(Phi phi, Points a, Points b, float* products /* [a.n, b.n] */,
                                          PairSums sums) {
  __shared__ unsigned close[kWords];
  __shared__ float room[kWarps], other_room[kWarps];
  const int64_t i = blockIdx.x;
  float* row = products + i * b.n;
  float* slope = sums.slope ? sums.slope + i * a.d : nullptr;
  float potential = 0, near_potential = 0, pull = 0;
  for (int64_t first = 0; first < b.n; first += kChunk) {
    float u[kAtOnce];
    const bool any = measure(a, b, i, first, row, u, close);
    if (__syncthreads_or(any)) {
      for (int w = 0; w < kWords; ++w)
        for (unsigned bits = close[w]; bits != 0; bits &= bits - 1)
          near_potential += add_near(phi, a, b, i, first + w * kWarp + __ffs(bits) - 1, slope, room);
      __syncthreads();  // all have read the bits before the next chunk's
    }
#pragma unroll
    for (int l = 0; l < kAtOnce; ++l) {
      const int64_t j = first + l * kThreads + threadIdx.x;
      if (j >= b.n) break;
      const Potential<float> p = phi.at(u[l]);
      const float weight = weight_of(b, j);
      potential += p.value * weight;
      pull += p.slope * weight;
      if (slope) row[j] = -p.slope * weight;
    }
  }
  potential = over_block(potential, room, Plus());
  pull = over_block(pull, other_room, Plus());
  if (threadIdx.x == 0) {
    sums.potential[i] += double(potential) + double(near_potential);
    sums.pull[i] += double(pull);
  }
}

__global__ void pair_sums_kernel(Points a, PairSums sums, float* potential /* [n] */) {
  const int64_t i = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (i >= a.n) return;
  const float pull = static_cast<float>(sums.pull[i]), total = static_cast<float>(sums.potential[i]);
  if (lane == 0) potential[i] = total;
  const bool wanted = sums.slope && (pull != 0 || total != 0);  // not where no pair counts, but for what is no number
  for (int64_t f = lane; wanted && f < a.d; f += kWarp) sums.slope[i * a.d + f] += pull * a.centred[i * a.d + f];
}

}  // namespace

int launch_centre(const float* given, const float* mean, int64_t n, int64_t d, float* centred, float* squares,
                  void* stream) {
  return launch(centre_kernel, blocks_of(n), stream, given, mean, n, d, centred, squares);
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
