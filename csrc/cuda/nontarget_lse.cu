// nontarget_lse on a GPU: what stands between the matrix products of one wave of classes (nontarget_lse_glue.cpp has
// the loop).
//
//   operands  o_j = w_j power_j, rounded;  power_j factor_j = 1 / ||w_j||            a warp a class
//   forward   z_ij = <x_i, o_j> factor_j: sum of exponentials and the k best         a block a row
//   backward  g_ij = lift d_rest_i exp(z_ij - rest_i) factor_j, 0 at the targets     a block a row
//             dw_j = power_j (I - w^_j w^_j^T) (sum_i g_ij x_i / lift + factor_j * entries of j)     a warp a class
//             dx_i = its entries' unit weights, before the first wave, + sum_j g_ij o_j / lift     a block a row
//
// A row belongs to one block in every wave, and waves follow each other on the stream: sums and lists are merged in the
// order of the classes, without atomics, so a run repeats bit for bit. Letters: B rows, n classes of a wave, d, k.
#include "block.cuh"
#include "classes.cuh"
#include "launch.h"
#include "operand.cuh"

namespace fastmargin {
namespace {

template <typename O>
__global__ void operands_kernel(Classes c, O* o /* [n, d] or null */, float* power /* [n] */, float* factor /* [n] */) {
  const int64_t j = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (j >= c.n) return;
  const float* w = row_of(c, c.first + j);
  const float scale = c.normalize ? inverse_norm(w, c) : 1.0f;
  float rest_of_scale;
  const float p = split_scale<O>(scale, rest_of_scale);
  if (lane == 0) {
    power[j] = p;
    factor[j] = rest_of_scale;
  }
  if (o == nullptr) return;
  for (int64_t f = lane; f < c.d; f += kWarp) o[j * c.d + f] = rounded(w[f * c.column] * p, O());
}

__device__ inline float logit(const Logits& z, const Classes& c, int64_t i, int64_t j) {
  const float bias = c.bias ? c.bias[id_of(c, c.first + j)] : 0.0f;
  return z.z[i * c.n + j] * z.factor[j] + bias;
}

// The sum of exponentials of the logits of one row that fall to this thread, and the first of the largest.
__device__ inline void scan(const Logits& z, const Classes& c, int64_t i, Running<float>& sum, Best& best) {
  constexpr int kAtOnce = 4;  // loads in flight, and exponents that share a rescaling
  const int64_t own = z.y[i] - c.first;
  for (int64_t j0 = threadIdx.x; j0 < c.n; j0 += kAtOnce * kThreads) {
    float v[kAtOnce];
#pragma unroll
    for (int l = 0; l < kAtOnce; ++l) {
      const int64_t j = j0 + l * kThreads;
      v[l] = j < c.n && j != own ? logit(z, c, i, j) : -INFINITY;
      if (v[l] > best.value) best = {v[l], c.first + j};
    }
    add(sum, v);
  }
}

// The best of the same logits that comes after `last`.
__device__ inline Best next_best(const Logits& z, const Classes& c, int64_t i, const Best& last) {
  const int64_t own = z.y[i] - c.first;
  Best best = {-INFINITY, INT64_MAX};
  for (int64_t j = threadIdx.x; j < c.n; j += kThreads) {
    const Best b = {logit(z, c, i, j), c.first + j};
    if (j != own && before(last, b) && before(b, best)) best = b;
  }
  return best;
}

__global__ void nontarget_lse_fwd_kernel(Logits z, Classes c, RowState s) {
  __shared__ Running<float> sums[kWarps];
  __shared__ Best bests[kWarps];
  const int64_t i = blockIdx.x;
  Running<float> sum = {kNoShift, 0.0f};
  Best mine = {-INFINITY, INT64_MAX};
  scan(z, c, i, sum, mine);
  sum = over_block(sum, sums, [](const auto& a, const auto& b) { return merge(a, b); });
  if (threadIdx.x == 0) {
    sum = merge({s.shift[i], s.sum[i]}, sum);
    s.shift[i] = sum.shift;
    s.sum[i] = sum.sum;
  }
  float* values = s.top_values + i * s.k;
  int64_t* places = s.top_places + i * s.k;
  for (int64_t found = 0; found < s.k; ++found) {
    const Best best = over_block(mine, bests, [](const Best& a, const Best& b) { return before(a, b) ? a : b; });
    if (!(best.value > values[s.k - 1])) break;  // of equal values the earlier wave's stays
    __syncthreads();                             // all have read the last value before one thread moves it
    if (threadIdx.x == 0) insert(values, places, s.k, best.value, best.place);
    if (best.place == mine.place) mine = next_best(z, c, i, best);
  }
}

__global__ void rest_kernel(RowState s, float* rest /* [B] */, int64_t B) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < B) rest[i] = s.sum[i] == 0.0f ? -INFINITY : s.shift[i] + logf(s.sum[i]);
}

template <typename O>
__global__ void nontarget_lse_bwd_kernel(Logits z, Classes c, Upstream u, O* g /* [B, n], may be z */) {
  const int64_t i = blockIdx.x, own = z.y[i] - c.first;
  const float rest = u.rest[i], lifted = *u.lift * u.d_rest[i];
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < c.n; j += kThreads) {
    const bool none = j == own || rest == -INFINITY;
    const float value = none ? 0.0f : gradient(logit(z, c, i, j), rest, lifted) * z.factor[j];
    g[i * c.n + j] = rounded(value, O());
  }
}

// The first entry whose class is not below `place`.
__device__ inline int64_t lower_bound(const Entries& e, int64_t place) {
  int64_t low = 0, high = e.m;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (e.place[middle] < place)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void weight_gradient_kernel(Classes c, Upstream u, Entries e, const float* power /* [n] */,
                                       const float* factor /* [n] */, float* dw /* [n, d] or null */,
                                       float* db /* [n] or null */) {
  const int64_t j = warp_of_grid(), lane = threadIdx.x % kWarp, place = c.first + j;
  if (j >= c.n) return;
  const float p = power[j], scale = p * factor[j], lift = *u.lift;
  const float* w = row_of(c, place);
  const int64_t begin = lower_bound(e, place);
  const bool has_entries = begin < e.m && e.place[begin] == place;
  for (int64_t f = lane; dw && has_entries && f < c.d; f += kWarp) {
    float sum = 0;
    for (int64_t t = begin; t < e.m && e.place[t] == place; ++t) sum += e.value[t] * u.x[e.row[t] * c.d + f];
    dw[j * c.d + f] = dw[j * c.d + f] / lift + factor[j] * sum;
  }
  const float drop = has_entries ? 1.0f : 1.0f / lift;
  float along = 0;
  for (int64_t f = lane; dw && f < c.d; f += kWarp) along += dw[j * c.d + f] * drop * (w[f * c.column] * scale);
  along = c.normalize ? over_warp(along, [](float a, float b) { return a + b; }) : 0.0f;
  for (int64_t f = lane; dw && f < c.d; f += kWarp)
    dw[j * c.d + f] = p * (dw[j * c.d + f] * drop - along * (w[f * c.column] * scale));
  if (db == nullptr || lane != 0) return;
  db[j] /= lift;
  for (int64_t t = begin; t < e.m && e.place[t] == place; ++t) db[j] += e.value[t];
}

// Adds value * w^ of one class to the row that this block holds.
__device__ inline void add_unit(const Classes& c, int64_t place, float value, float* dx /* [d] */) {
  if (place < 0 || place >= c.all) return;
  const float* w = row_of(c, place);
  const float scale = c.normalize ? inverse_norm(w, c) : 1.0f;
  for (int64_t f = threadIdx.x; f < c.d; f += kThreads) dx[f] += value * (w[f * c.column] * scale);
}

// dx of a row's target and its best alone.
__global__ void row_gradient_kernel(Classes c, Upstream u, const int64_t* y /* [B] */, float* dx /* [B, d] */) {
  const int64_t i = blockIdx.x;
  for (int64_t f = threadIdx.x; f < c.d; f += kThreads) dx[i * c.d + f] = 0;
  add_unit(c, y[i], u.d_target[i], dx + i * c.d);
  for (int64_t t = i * u.k; u.d_topk && t < (i + 1) * u.k; ++t) add_unit(c, u.top_places[t], u.d_topk[t], dx + i * c.d);
}

__global__ void add_splits_kernel(Upstream u, const float* splits, int64_t count /* splits [count, n] */, int64_t n,
                                  float* dx /* [n] */) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= n) return;
  float sum = 0;
  for (int64_t s = 0; s < count; ++s) sum += splits[s * n + at];
  dx[at] += sum * (1.0f / *u.lift);
}

}  // namespace

int launch_operands(OperandType type, const Classes& c, void* o, float* power, float* factor, void* stream) {
  return with_operand(type, [&](auto t) {
    using O = decltype(t);
    return launch(operands_kernel<O>, blocks_of(c.n), stream, c, static_cast<O*>(o), power, factor);
  });
}

int launch_nontarget_lse_fwd(const Logits& z, const Classes& c, const RowState& s, void* stream) {
  return launch(nontarget_lse_fwd_kernel, z.B, stream, z, c, s);
}

int launch_rest(const RowState& s, float* rest, int64_t B, void* stream) {
  return launch(rest_kernel, (B + kThreads - 1) / kThreads, stream, s, rest, B);
}

int launch_nontarget_lse_bwd(OperandType type, const Logits& z, const Classes& c, const Upstream& u, void* g,
                             void* stream) {
  return with_operand(type, [&](auto t) {
    using O = decltype(t);
    return launch(nontarget_lse_bwd_kernel<O>, z.B, stream, z, c, u, static_cast<O*>(g));
  });
}

int launch_weight_gradient(const Classes& c, const Upstream& u, const Entries& e, const float* power,
                           const float* factor, float* dw, float* db, void* stream) {
  return launch(weight_gradient_kernel, blocks_of(c.n), stream, c, u, e, power, factor, dw, db);
}

int launch_row_gradient(const Classes& c, const Upstream& u, const int64_t* y, int64_t B, float* dx, void* stream) {
  return launch(row_gradient_kernel, B, stream, c, u, y, dx);
}

int launch_add_splits(const Upstream& u, const float* splits, int64_t count, int64_t n, float* dx, void* stream) {
  return launch(add_splits_kernel, (n + kThreads - 1) / kThreads, stream, u, splits, count, n, dx);
}

}  // namespace fastmargin
