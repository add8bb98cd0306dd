// nontarget_lse on a GPU: the kernels between the matrix products of one chunk of classes (nontarget_lse_glue.cpp has
// the loop over chunks).
//
//   operands  o_j = w_j exponent_scale_j, rounded;  exponent_scale_j residual_scale_j = 1 / ||w_j||    a warp per class
//   forward   z_ij = <x_i, o_j> residual_scale_j: sum of exponentials and the k best                   a block per row
//   backward  g_ij = d_rest_scale d_rest_i exp(z_ij - rest_i) residual_scale_j, 0 at the targets       a block per row
//             dw_j = exponent_scale_j (I - w^_j w^_j^T)
//                    (sum_i g_ij x_i / d_rest_scale + residual_scale_j * sum of e x_i over j's entries (i, e))
//                                                                                                      a warp per class
//             dx_i = sum of e w^_c over the row's entries (c, e), before the first chunk,              a block per row
//                    + sum_j g_ij o_j / d_rest_scale
//
// Entries are d_target at a row's own class, and d_topk at its top-k. A row is handled by one block in every chunk, and
// chunks follow each other on the stream: sums and lists are merged in the order of the classes, without atomics, so
// runs repeat bit for bit. Letters: B rows, n classes of a chunk, d, k.
#include "block.cuh"
#include "classes.cuh"
#include "launch.h"
#include "operand.cuh"

namespace fastmargin {
namespace {

template <typename O>
__global__ void operands_kernel(Classes c, O* o /* [n, d] or null */, float* exponent_scale /* [n] */,
                                float* residual_scale /* [n] */) {
  const int64_t j = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (j >= c.n) return;
  if (!has_class(c, c.first + j)) {  // zeros, so that the products over the whole chunk stay finite
    for (int64_t f = lane; o && f < c.d; f += kWarp) o[j * c.d + f] = rounded(0.0f, O());
    if (lane == 0) exponent_scale[j] = residual_scale[j] = 0.0f;
    return;
  }
  const float* w = row_of(c, c.first + j);
  const float scale = c.normalize ? inverse_norm(w, c) : 1.0f;
  float residual;
  const float exponent = split_scale<O>(scale, residual);
  if (lane == 0) {
    exponent_scale[j] = exponent;
    residual_scale[j] = residual;
  }
  if (o == nullptr) return;
  for (int64_t f = lane; f < c.d; f += kWarp) o[j * c.d + f] = rounded(w[f * c.column] * exponent, O());
}

__device__ inline float logit(const Logits& z, const Classes& c, int64_t i, int64_t j) {
  const float bias = c.bias ? c.bias[id_of(c, c.first + j)] : 0.0f;
  return z.z[i * c.n + j] * z.residual_scale[j] + bias;
}

// Over this thread's logits of one row: the sum of exponentials, and the first of the largest.
__device__ inline void scan(const Logits& z, const Classes& c, int64_t i, Running<float>& sum, Best& best) {
  constexpr int kAtOnce = 4;  // loads in flight, and exponents that share a rescaling
  const int64_t own = z.y[i] - c.first, n = classes_in(c);
  for (int64_t j0 = threadIdx.x; j0 < n; j0 += kAtOnce * kThreads) {
    float v[kAtOnce];
#pragma unroll
    for (int l = 0; l < kAtOnce; ++l) {
      const int64_t j = j0 + l * kThreads;
      v[l] = j < n && j != own ? logit(z, c, i, j) : -INFINITY;
      if (v[l] > best.value) best = {v[l], c.first + j};
    }
    add(sum, v);
  }
}

// Of the same logits the next one after `last`, in descending order.
__device__ inline Best next_best(const Logits& z, const Classes& c, int64_t i, const Best& last) {
  const int64_t own = z.y[i] - c.first, n = classes_in(c);
  Best best = {-INFINITY, INT64_MAX};
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
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
  float* values = s.topk_values + i * s.k;
  int64_t* classes = s.topk_classes + i * s.k;
  for (int64_t found = 0; found < s.k; ++found) {
    const Best best = over_block(mine, bests, [](const Best& a, const Best& b) { return before(a, b) ? a : b; });
    if (!(best.value > values[s.k - 1])) break;  // of equal values the earlier chunk's stays
    __syncthreads();                             // all threads have read values[k - 1] before one thread changes it
    if (threadIdx.x == 0) insert(values, classes, s.k, best.value, best.class_index);
    if (best.class_index == mine.class_index) mine = next_best(z, c, i, best);
  }
}

__global__ void rest_kernel(RowState s, float* rest /* [B] */, int64_t B) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < B) rest[i] = s.sum[i] == 0.0f ? -INFINITY : s.shift[i] + logf(s.sum[i]);
}

template <typename O>
__global__ void nontarget_lse_bwd_kernel(Logits z, Classes c, Upstream u, O* g /* [B, n], may be z */) {
  const int64_t i = blockIdx.x, own = z.y[i] - c.first, n = classes_in(c);
  const float rest = u.rest[i], scaled_d_rest = *u.d_rest_scale * u.d_rest[i];
#pragma unroll 4
  for (int64_t j = threadIdx.x; j < c.n; j += kThreads) {
    const bool none = j >= n || j == own || rest == -INFINITY;
    const float value = none ? 0.0f : gradient(logit(z, c, i, j), rest, scaled_d_rest) * z.residual_scale[j];
    g[i * c.n + j] = rounded(value, O());
  }
}

// The first entry whose class index is not below `index`.
__device__ inline int64_t lower_bound(const Entries& e, int64_t index) {
  int64_t low = 0, high = e.m;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (e.class_index[middle] < index)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void weight_gradient_kernel(Classes c, Upstream u, Entries e, const float* exponent_scale /* [n] */,
                                       const float* residual_scale /* [n] */, float* dw /* [n, d] or null */,
                                       float* db /* [n] or null */) {
  const int64_t j = warp_of_grid(), lane = threadIdx.x % kWarp, index = c.first + j;
  if (j >= c.n) return;
  if (!has_class(c, index)) {
    for (int64_t f = lane; dw && f < c.d; f += kWarp) dw[j * c.d + f] = 0.0f;
    if (db && lane == 0) db[j] = 0.0f;
    return;
  }
  const float exponent = exponent_scale[j], scale = exponent * residual_scale[j], d_rest_scale = *u.d_rest_scale;
  const float* w = row_of(c, index);
  const int64_t begin = lower_bound(e, index);
  const bool has_entries = begin < e.m && e.class_index[begin] == index;
  for (int64_t f = lane; dw && has_entries && f < c.d; f += kWarp) {
    float sum = 0;
    for (int64_t t = begin; t < e.m && e.class_index[t] == index; ++t) sum += e.value[t] * u.x[e.row[t] * c.d + f];
    dw[j * c.d + f] = dw[j * c.d + f] / d_rest_scale + residual_scale[j] * sum;
  }
  const float inverse = has_entries ? 1.0f : 1.0f / d_rest_scale;
  float along = 0;
  for (int64_t f = lane; dw && f < c.d; f += kWarp) along += dw[j * c.d + f] * inverse * (w[f * c.column] * scale);
  along = c.normalize ? over_warp(along, [](float a, float b) { return a + b; }) : 0.0f;
  for (int64_t f = lane; dw && f < c.d; f += kWarp)
    dw[j * c.d + f] = exponent * (dw[j * c.d + f] * inverse - along * (w[f * c.column] * scale));
  if (db == nullptr || lane != 0) return;
  db[j] /= d_rest_scale;
  for (int64_t t = begin; t < e.m && e.class_index[t] == index; ++t) db[j] += e.value[t];
}

// Adds value * w^ of one class to dx of this block's row.
__device__ inline void add_unit(const Classes& c, int64_t index, float value, float* dx /* [d] */) {
  if (!has_class(c, index)) return;
  const float* w = row_of(c, index);
  const float scale = c.normalize ? inverse_norm(w, c) : 1.0f;
  for (int64_t f = threadIdx.x; f < c.d; f += kThreads) dx[f] += value * (w[f * c.column] * scale);
}

// The part of dx that comes from a row's target and top-k.
__global__ void row_gradient_kernel(Classes c, Upstream u, const int64_t* y /* [B] */, float* dx /* [B, d] */) {
  const int64_t i = blockIdx.x;
  for (int64_t f = threadIdx.x; f < c.d; f += kThreads) dx[i * c.d + f] = 0;
  add_unit(c, y[i], u.d_target[i], dx + i * c.d);
  for (int64_t t = i * u.k; u.d_topk && t < (i + 1) * u.k; ++t)
    add_unit(c, u.topk_classes[t], u.d_topk[t], dx + i * c.d);
}

__global__ void add_splits_kernel(Upstream u, const float* splits, int64_t count /* splits [count, n] */, int64_t n,
                                  float* dx /* [n] */) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= n) return;
  float sum = 0;
  for (int64_t s = 0; s < count; ++s) sum += splits[s * n + at];
  dx[at] += sum * (1.0f / *u.d_rest_scale);
}

}  // namespace

int launch_operands(OperandType type, const Classes& c, void* o, float* exponent_scale, float* residual_scale,
                    void* stream) {
  return with_operand(type, [&](auto t) {
    using O = decltype(t);
    return launch(operands_kernel<O>, blocks_of(c.n), stream, c, static_cast<O*>(o), exponent_scale, residual_scale);
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

int launch_weight_gradient(const Classes& c, const Upstream& u, const Entries& e, const float* exponent_scale,
                           const float* residual_scale, float* dw, float* db, void* stream) {
  return launch(weight_gradient_kernel, blocks_of(c.n), stream, c, u, e, exponent_scale, residual_scale, dw, db);
}

int launch_row_gradient(const Classes& c, const Upstream& u, const int64_t* y, int64_t B, float* dx, void* stream) {
  return launch(row_gradient_kernel, B, stream, c, u, y, dx);
}

int launch_add_splits(const Upstream& u, const float* splits, int64_t count, int64_t n, float* dx, void* stream) {
  return launch(add_splits_kernel, (n + kThreads - 1) / kThreads, stream, u, splits, count, n, dx);
}

}  // namespace fastmargin
