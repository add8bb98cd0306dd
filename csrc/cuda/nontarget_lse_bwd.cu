// nontarget_lse on a GPU: the kernels of the backward pass between the matrix products of one chunk of classes
// (nontarget_lse_bwd_glue.cpp has the loop over chunks).
//
//   scales    offset_i = rest_i + t_i, c_i = lift d_rest_i exp(t_i);  of kept E c_i = lift d_rest_i exp(o - rest_i)
//   backward  E_ij = exp(z_ij - offset_i) residual_scale_j, 0 at the targets                          block per part
//             dw_j = exponent_scale_j (I - w^_j w^_j^T)
//                    (sum_i E_ij c_i x_i / lift + residual_scale_j * sum of e x_i over j's entries (i, e))
//                                                                                                      a warp per class
//             dx_i = sum of e w^_c over the row's entries (c, e), before the first chunk,              a block per row
//                    + c_i / lift sum_j E_ij o_j
//
// Entries are d_target at a row's own class, and d_topk at its top-k. lift, a power of two, brings the largest d_rest
// into [1/2, 1), so that no c_i x_i over- or underflows when it is rounded. t_i in [0, ln 2) is spread evenly over the
// rows: where a class has all of each row's probability, as the other one of two, its E would be the same rounded
// number in all rows, whose error would not average out. No atomics, so runs repeat bit for bit. Letters: B rows, n
// classes of a chunk, d, k.
#include "logits.cuh"

namespace fastmargin {
namespace {

constexpr float kLn2 = 0.693147181f;
constexpr int kHalfExponent = 14;   // float16 has a small exponent range: there E is up to 2^15
constexpr int kMostExponent = 100;  // of lift: a float32 ends at 2^127

// The fraction of the i-th multiple of the golden ratio, times ln 2.
__device__ inline float spread(int64_t i) {
  return kLn2 * (float(uint32_t(i) * 2654435769u >> 8) * (1.0f / (1 << 24)));
}

__device__ inline float lift_of(float largest) {
  int exponent = 0;
  if (largest > 0.0f && largest < INFINITY) frexpf(largest, &exponent);
  return ldexpf(1.0f, -exponent < kMostExponent ? -exponent : kMostExponent);
}

// One block: B is small beside B x C.
__global__ void row_scales_kernel(Upstream u, int64_t B, OperandType type, bool kept, float kept_offset,
                                  RowScales out) {
  __shared__ float scratch[kWarps];
  float largest = 0;
  for (int64_t i = threadIdx.x; i < B; i += kThreads) largest = fmaxf(largest, fabsf(u.d_rest[i]));
  const float lift = lift_of(over_block(largest, scratch, [](float a, float b) { return fmaxf(a, b); }));
  const int exponent = type == OperandType::kHalf ? kHalfExponent : 0;
  for (int64_t i = threadIdx.x; i < B; i += kThreads) {
    const float rest = u.rest[i], t = spread(i);
    const bool none = rest == -INFINITY;
    const float factor = none ? 0.0f : kept ? expf(kept_offset - rest) : expf(t);
    out.offset[i] = none ? INFINITY : rest + (t - float(exponent) * kLn2);
    out.c[i] = lift * u.d_rest[i] * factor;
    out.dx_scale[i] = ldexpf(u.d_rest[i] * factor, -exponent);
  }
  if (threadIdx.x == 0) *out.lift = ldexpf(lift, exponent);
}

template <bool kPlain, typename O>
__device__ inline void write_exponentials(const Logits& z, const Classes& c, const Part& p, float offset,
                                          O* e /* [n] */) {
  const float *row = z.z + p.row * c.n, *scale = z.residual_scale;
  const auto single = [&](int j) {
    const float value = fast_exp(logit(z, c, p, j) - offset) * scale[j];
    e[j] = rounded(j == p.own ? 0.0f : value, O());
  };
  each_single(p, 0, p.head, single);
  each_quad(p, [&](int j, auto quads) {
    constexpr int N = decltype(quads)::count;
    float v[4 * N], s[4 * N];
    load<kPlain, N>(row, scale, j, v, s);
#pragma unroll
    for (int l = 0; l < 4 * N; ++l)
      v[l] = fast_exp(logit<kPlain>(v[l], s[l], c, j + l / 4 * kNext + l % 4) - offset) * s[l];
#pragma unroll
    for (int q = 0; q < N; ++q) store_quad(e + j + q * kNext, v + 4 * q);
  });
  each_single(p, p.tail, p.n, single);
  const int in_quads = p.own - p.begin;  // overwritten by the thread that wrote it: no test in the loop
  if (in_quads >= 0 && p.own < p.end && in_quads % kNext / 4 == int(threadIdx.x)) e[p.own] = rounded(0.0f, O());
}

// A block per part of a row. Without another class E is 0, as the offset is infinite.
template <typename O>
__global__ void nontarget_lse_bwd_kernel(Logits z, Classes c, const float* offset /* [B] */,
                                         O* e /* [B, n], may be z */, int parts) {
  const int n = int(classes_in(c));
  const Part p = part_of(z, c, n, parts);
  O* row = e + p.row * c.n;
  is_plain(z, c, p) ? write_exponentials<true>(z, c, p, offset[p.row], row)
                    : write_exponentials<false>(z, c, p, offset[p.row], row);
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

// Stored: the type of E; all narrow ones split 1 / ||w|| in the same way.
template <typename Stored>
__global__ void weight_gradient_kernel(Classes c, Upstream u, Entries e, const float* lift /* [1] */,
                                       float* dw /* [n, d] or null */, float* db /* [n] or null */) {
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
  const float* w = row_of(c, c.first + j);
  float residual;
  const float exponent = split_scale<Stored>(c.normalize ? inverse_norm(w, c) : 1.0f, residual),
              scale = exponent * residual;
  const int64_t begin = begins[threadIdx.x / kWarp], end = begins[threadIdx.x / kWarp + 1];
  const bool has_entries = begin < end;
  for (int64_t f = lane; dw && has_entries && f < c.d; f += kWarp) {
    float sum = 0;
    for (int64_t t = begin; t < end; ++t) sum += e.value[t] * u.x[e.row[t] * c.d + f];
    dw[j * c.d + f] = dw[j * c.d + f] / *lift + residual * sum;
  }
  const float inverse = has_entries ? 1.0f : 1.0f / *lift;
  float along = 0;
  for (int64_t f = lane; dw && f < c.d; f += kWarp) along += dw[j * c.d + f] * inverse * (w[f * c.column] * scale);
  along = c.normalize ? over_warp(along, [](float a, float b) { return a + b; }) : 0.0f;
  for (int64_t f = lane; dw && f < c.d; f += kWarp)
    dw[j * c.d + f] = exponent * (dw[j * c.d + f] * inverse - along * (w[f * c.column] * scale));
  if (db == nullptr || lane != 0) return;
  db[j] /= *lift;
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

__global__ void add_splits_kernel(const float* splits, int64_t count /* splits [count, B, d] */, int64_t B, int64_t d,
                                  const float* scale /* [B] */, float* dx /* [B, d] */) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= B * d) return;
  float sum = 0;
  for (int64_t s = 0; s < count; ++s) sum += splits[s * B * d + at];
  dx[at] += sum * scale[at / d];
}

}  // namespace

int launch_row_scales(OperandType type, const Upstream& u, int64_t B, const float* kept_offset, const RowScales& out,
                      void* stream) {
  const bool kept = kept_offset != nullptr;
  return launch(row_scales_kernel, 1, stream, u, B, type, kept, kept ? *kept_offset : 0.0f, out);
}

int launch_nontarget_lse_bwd(OperandType type, const Logits& z, const Classes& c, const float* offset, void* e,
                             void* stream) {
  return with_operand(type, [&](auto t) {
    using O = decltype(t);
    return launch(nontarget_lse_bwd_kernel<O>, z.B * parts_of(z.B), stream, z, c, offset, static_cast<O*>(e),
                  parts_of(z.B));
  });
}

int launch_weight_gradient(OperandType type, const Classes& c, const Upstream& u, const Entries& e, const float* lift,
                           float* dw, float* db, void* stream) {
  const auto kernel = type == OperandType::kFloat ? weight_gradient_kernel<float> : weight_gradient_kernel<Bf16>;
  return launch(kernel, blocks_of(c.n), stream, c, u, e, lift, dw, db);
}

int launch_row_gradient(const Classes& c, const Upstream& u, const int64_t* y, int64_t B, float* dx, void* stream) {
  return launch(row_gradient_kernel, B, stream, c, u, y, dx);
}

int launch_add_splits(const float* splits, int64_t count, int64_t B, int64_t d, const float* scale, float* dx,
                      void* stream) {
  return launch(add_splits_kernel, (B * d + kThreads - 1) / kThreads, stream, splits, count, B, d, scale, dx);
}

}  // namespace fastmargin
