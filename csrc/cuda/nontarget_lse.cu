// nontarget_lse on a GPU: the kernels between the matrix products of one chunk of classes (nontarget_lse_glue.cpp has
// the loop over chunks).
//
//   operands  o_j = w_j exponent_scale_j, rounded;  exponent_scale_j residual_scale_j = 1 / ||w_j||    a warp per class
//   forward   z_ij = <x_i, o_j> residual_scale_j: sum of exponentials and the k best                    block per part
//   backward  g_ij = d_rest_scale d_rest_i exp(z_ij - rest_i) residual_scale_j, 0 at the targets        block per part
//             dw_j = exponent_scale_j (I - w^_j w^_j^T)
//                    (sum_i g_ij x_i / d_rest_scale + residual_scale_j * sum of e x_i over j's entries (i, e))
//                                                                                                      a warp per class
//             dx_i = sum of e w^_c over the row's entries (c, e), before the first chunk,              a block per row
//                    + sum_j g_ij o_j / d_rest_scale
//
// Entries are d_target at a row's own class, and d_topk at its top-k. A part of a row, the whole of it where there are
// many rows, is handled by one block in every chunk, chunks follow each other on the stream, and parts are merged
// in their order at the end: without atomics, so runs repeat bit for bit. Letters: B rows, n classes of a chunk, d, k.
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

// A block's part of a row of z: quads, four columns whose logits lie on 16 bytes, and whose g does on those of a quad
// of g, since z and g begin memory of their own. The first part also has the columns before and behind all quads, up to
// three each.
struct Part {
  int64_t row;
  int own;            // the row's own column, or -1
  int begin, end;     // first columns of the part's quads, and their end
  int head, tail, n;  // columns before `head`, and from `tail` to n, are no quads
  bool first;
};

__device__ inline Part part_of(const Logits& z, const Classes& c, int n, int parts) {
  const int part = int(blockIdx.x) % parts;
  const int64_t row = int64_t(blockIdx.x) / parts, own = z.y[row] - c.first;
  const uintptr_t address = reinterpret_cast<uintptr_t>(z.z + row * c.n) / sizeof(float);
  const int before_quads = int(-address % 4), head = before_quads < n ? before_quads : n, quads = (n - head) / 4;
  return {row,
          own >= 0 && own < n ? int(own) : -1,
          head + 4 * (quads * part / parts),
          head + 4 * (quads * (part + 1) / parts),
          head,
          head + 4 * quads,
          n,
          part == 0};
}

// Calls f with this thread's column of [from, to), which has few, in the row's first part.
template <typename F>
__device__ inline void each_single(const Part& p, int from, int to, const F& f) {
  const int j = from + int(threadIdx.x);
  if (p.first && j < to) f(j);
}

// Calls f(column, constant) with the first columns of this thread's quads: of as many at once as `constant` says, which
// lie kNext columns apart, so that several loads are in flight.
constexpr int kAtOnce = 2, kNext = 4 * kThreads;

template <int N>
struct Quads {
  static constexpr int count = N;
};

template <typename F>
__device__ inline void each_quad(const Part& p, const F& f) {
  int j = p.begin + 4 * int(threadIdx.x);
  for (; j + kNext < p.end; j += kAtOnce * kNext) f(j, Quads<kAtOnce>());
  if (j < p.end) f(j, Quads<1>());
}

template <bool kPlain>
__device__ inline float logit(float product, float scale, const Classes& c, int j) {
  return kPlain || !c.bias ? product * scale : product * scale + c.bias[id_of(c, c.first + j)];
}

// Whether all quads of scales lie on 16 bytes, as those of z do, and there is no bias: the loop that counts.
__device__ inline bool is_plain(const Logits& z, const Classes& c, const Part& p) {
  return !c.bias && reinterpret_cast<uintptr_t>(z.residual_scale + p.head) % sizeof(Quad) == 0;
}

// Loads N quads of products and of scales.
template <bool kPlain, int N>
__device__ inline void load(const float* z /* [n] */, const float* scale /* [n] */, int j, float (&v)[4 * N],
                            float (&s)[4 * N]) {
#pragma unroll
  for (int q = 0; q < N; ++q) {
    const int at = j + q * kNext;
    const Quad products = *reinterpret_cast<const Quad*>(z + at);
    Quad scales;
    if (kPlain)
      scales = *reinterpret_cast<const Quad*>(scale + at);
    else
      scales = {scale[at], scale[at + 1], scale[at + 2], scale[at + 3]};
#pragma unroll
    for (int l = 0; l < 4; ++l) {
      v[4 * q + l] = products.v[l];
      s[4 * q + l] = scales.v[l];
    }
  }
}

__device__ inline float logit(const Logits& z, const Classes& c, const Part& p, int j) {
  return logit<false>(z.z[p.row * c.n + j], z.residual_scale[j], c, j);
}

template <int N>
__device__ inline float largest(float top, const float (&v)[N]) {
#pragma unroll
  for (int l = 0; l < N; ++l) top = fmaxf(top, v[l]);
  return top;
}

// Adds logits, whose columns ascend from those before, to the sum of exponentials and to the first of the largest.
// Rare, and one branch: the row's own column is among them and is taken out, or there is a new largest and the sum is
// rescaled.
template <int N, typename F>
__device__ inline void take(float (&v)[N], const F& column, int own, bool has_own, int64_t first, Running<float>& sum,
                            Best& best) {
  if (has_own | (largest(best.value, v) > best.value)) {
#pragma unroll
    for (int l = 0; l < N; ++l)
      if (column(l) == own) v[l] = -INFINITY;
    const float top = largest(best.value, v), shift = fmaxf(sum.shift, top);
    sum = {shift, sum.sum * rescale(sum.shift, shift)};
#pragma unroll
    for (int l = N - 1; l >= 0; --l)
      if (top > best.value && v[l] == top) best.class_index = first + column(l);
    best.value = top;
  }
#pragma unroll
  for (int l = 0; l < N; ++l) sum.sum += fast_exp(v[l] - sum.shift);
}

template <bool kPlain>
__device__ inline void scan(const Logits& z, const Classes& c, const Part& p, Running<float>& sum, Best& best) {
  const float *row = z.z + p.row * c.n, *scale = z.residual_scale;
  const auto single = [&](int j) {
    float v[1] = {logit(z, c, p, j)};
    take(v, [&](int) { return j; }, p.own, j == p.own, c.first, sum, best);
  };
  each_single(p, 0, p.head, single);
  each_quad(p, [&](int j, auto quads) {
    constexpr int N = decltype(quads)::count;
    const auto column = [&](int l) { return j + l / 4 * kNext + l % 4; };
    float v[4 * N], s[4 * N];
    load<kPlain, N>(row, scale, j, v, s);
#pragma unroll
    for (int l = 0; l < 4 * N; ++l) v[l] = logit<kPlain>(v[l], s[l], c, column(l));
    // one test for all quads, since kNext is a power of two
    const bool has_own = (unsigned(p.own - j) & ~unsigned((N - 1) * kNext)) < 4;
    take(v, column, p.own, has_own, c.first, sum, best);
  });
  each_single(p, p.tail, p.n, single);
}

// Of the same logits the next one after `last`, in descending order.
__device__ inline Best next_best(const Logits& z, const Classes& c, const Part& p, const Best& last) {
  Best best = {-INFINITY, INT64_MAX};
  const auto offer = [&](int j) {
    const Best b = {logit(z, c, p, j), c.first + j};
    if (j != p.own && before(last, b) && before(b, best)) best = b;
  };
  each_single(p, 0, p.head, offer);
  for (int j = p.begin + 4 * int(threadIdx.x); j < p.end; j += kNext)
    for (int l = 0; l < 4; ++l) offer(j + l);
  each_single(p, p.tail, p.n, offer);
  return best;
}

// A block per part of a row.
__global__ void nontarget_lse_fwd_kernel(Logits z, Classes c, RowState s, int parts) {
  const int n = int(classes_in(c));
  __shared__ Running<float> sums[kWarps];
  __shared__ Best bests[kWarps];
  const int64_t i = blockIdx.x;
  const Part p = part_of(z, c, n, parts);
  Running<float> sum = {kNoShift, 0.0f};
  Best mine = {-INFINITY, INT64_MAX};
  is_plain(z, c, p) ? scan<true>(z, c, p, sum, mine) : scan<false>(z, c, p, sum, mine);
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
    if (found + 1 < s.k && best.class_index == mine.class_index) mine = next_best(z, c, p, best);
  }
}

// A block per row: merges its parts, sums in their order, lists by how many candidates come before each.
__global__ void merge_parts_kernel(RowState s, int64_t parts, float* rest /* [B] */, float* topk_values /* [B, k] */,
                                   int64_t* topk_classes /* [B, k] */) {
  const int64_t i = blockIdx.x, first = i * parts, m = parts * s.k;
  const float* values = s.topk_values + first * s.k;
  const int64_t* classes = s.topk_classes + first * s.k;
  for (int64_t t = threadIdx.x; t < m; t += kThreads) {
    if (classes[t] < 0) continue;  // fewer than k candidates
    int64_t rank = 0;
    for (int64_t other = 0; other < m && rank < s.k; ++other)
      rank += classes[other] >= 0 && before({values[other], classes[other]}, {values[t], classes[t]});
    if (rank >= s.k) continue;
    topk_values[i * s.k + rank] = values[t];
    topk_classes[i * s.k + rank] = classes[t];
  }
  if (threadIdx.x != 0) return;
  Running<float> sum = {s.shift[first], s.sum[first]};
  for (int64_t part = 1; part < parts; ++part) sum = merge(sum, {s.shift[first + part], s.sum[first + part]});
  rest[i] = sum.sum == 0.0f ? -INFINITY : sum.shift + logf(sum.sum);
}

template <bool kPlain, typename O>
__device__ inline void write_gradients(const Logits& z, const Classes& c, const Part& p, float rest, float d_rest,
                                       O* g /* [n] */) {
  const float *row = z.z + p.row * c.n, *scale = z.residual_scale;
  const auto single = [&](int j) {
    const float value = d_rest * fast_exp(logit(z, c, p, j) - rest) * scale[j];
    g[j] = rounded(j == p.own ? 0.0f : value, O());
  };
  each_single(p, 0, p.head, single);
  each_quad(p, [&](int j, auto quads) {
    constexpr int N = decltype(quads)::count;
    float v[4 * N], s[4 * N];
    load<kPlain, N>(row, scale, j, v, s);
#pragma unroll
    for (int l = 0; l < 4 * N; ++l)
      v[l] = d_rest * fast_exp(logit<kPlain>(v[l], s[l], c, j + l / 4 * kNext + l % 4) - rest) * s[l];
#pragma unroll
    for (int q = 0; q < N; ++q) store_quad(g + j + q * kNext, v + 4 * q);
  });
  each_single(p, p.tail, p.n, single);
  const int in_quads = p.own - p.begin;  // overwritten by the thread that wrote it: no test in the loop
  if (in_quads >= 0 && p.own < p.end && in_quads % kNext / 4 == int(threadIdx.x)) g[p.own] = rounded(0.0f, O());
}

// A block per part of a row. Without another class g is 0, as it is for an infinite rest.
template <typename O>
__global__ void nontarget_lse_bwd_kernel(Logits z, Classes c, Upstream u, O* g /* [B, n], may be z */, int parts) {
  const int n = int(classes_in(c));
  const Part p = part_of(z, c, n, parts);
  const bool none = u.rest[p.row] == -INFINITY;
  const float rest = none ? INFINITY : u.rest[p.row], d_rest = none ? 0.0f : *u.d_rest_scale * u.d_rest[p.row];
  O* row = g + p.row * c.n;
  is_plain(z, c, p) ? write_gradients<true>(z, c, p, rest, d_rest, row)
                    : write_gradients<false>(z, c, p, rest, d_rest, row);
  for (int j = n + int(threadIdx.x); p.first && j < c.n; j += kThreads) row[j] = rounded(0.0f, O());  // no class there
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
  __shared__ int64_t begins[kWarps + 1];  // of the entries of the block's classes
  const int64_t j = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (threadIdx.x <= kWarps) begins[threadIdx.x] = lower_bound(e, c.first + int64_t(blockIdx.x) * kWarps + threadIdx.x);
  __syncthreads();
  if (j >= c.n) return;
  if (!has_class(c, c.first + j)) {
    for (int64_t f = lane; dw && f < c.d; f += kWarp) dw[j * c.d + f] = 0.0f;
    if (db && lane == 0) db[j] = 0.0f;
    return;
  }
  const float exponent = exponent_scale[j], scale = exponent * residual_scale[j], d_rest_scale = *u.d_rest_scale;
  const float* w = row_of(c, c.first + j);
  const int64_t begin = begins[threadIdx.x / kWarp], end = begins[threadIdx.x / kWarp + 1];
  const bool has_entries = begin < end;
  for (int64_t f = lane; dw && has_entries && f < c.d; f += kWarp) {
    float sum = 0;
    for (int64_t t = begin; t < end; ++t) sum += e.value[t] * u.x[e.row[t] * c.d + f];
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
  for (int64_t t = begin; t < end; ++t) db[j] += e.value[t];
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
  return launch(nontarget_lse_fwd_kernel, z.B * parts_of(z.B), stream, z, c, s, parts_of(z.B));
}

int launch_merge_parts(const RowState& s, int64_t B, float* rest, float* topk_values, int64_t* topk_classes,
                       void* stream) {
  return launch(merge_parts_kernel, B, stream, s, parts_of(B), rest, topk_values, topk_classes);
}

int launch_nontarget_lse_bwd(OperandType type, const Logits& z, const Classes& c, const Upstream& u, void* g,
                             void* stream) {
  return with_operand(type, [&](auto t) {
    using O = decltype(t);
    return launch(nontarget_lse_bwd_kernel<O>, z.B * parts_of(z.B), stream, z, c, u, static_cast<O*>(g), parts_of(z.B));
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
