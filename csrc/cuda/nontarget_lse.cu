// nontarget_lse on a GPU: the kernels of the forward pass between the matrix products of one chunk of classes
// (nontarget_lse_glue.cpp has the loop over chunks).
//
//   operands  o_j = w_j exponent_scale_j, rounded;  exponent_scale_j residual_scale_j = 1 / ||w_j||    a warp per class
//   forward   z_ij = <x_i, o_j> residual_scale_j: sum of exponentials and the k best                    block per part
//             E_ij = exp(z_ij - offset) residual_scale_j, 0 at the targets, where they are kept
//
// A part of a row, the whole of it where there are many rows, is handled by one block in every chunk, chunks follow
// each other on the stream, and parts are merged in their order at the end: without atomics, so runs repeat bit for
// bit. Letters: B rows, n classes of a chunk, d, k.
#include "logits.cuh"

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

template <int N>
__device__ inline float largest(float top, const float (&v)[N]) {
#pragma unroll
  for (int l = 0; l < N; ++l) top = fmaxf(top, v[l]);
  return top;
}

// Keeps no exponentials.
struct KeepNone {
  static constexpr bool kKeeps = false;
  __device__ void one(int, float) const {}
  template <bool kAligned>
  __device__ void quad(int, const float*) const {}
};

// Keeps them, times residual_scale.
template <typename O>
struct KeepIn {
  static constexpr bool kKeeps = true;
  O* e;  // [n] the row

  __device__ void one(int j, float v) const { e[j] = rounded(v, O()); }
  template <bool kAligned>
  __device__ void quad(int j, const float* v) const {
    if (kAligned)
      store_quad(e + j, v);
    else
      for (int l = 0; l < 4; ++l) one(j + l, v[l]);
  }
};

// Adds logits, whose columns ascend from those before, to the sum of exponentials and to the first of the largest. They
// become their exponentials. Rare, and one branch: the row's own column is among them and is taken out, or there is a
// new largest and, unless the shift is fixed, the sum is rescaled.
template <bool kFixed, int N, typename F>
__device__ inline void take(float (&v)[N], const F& column, int own, bool has_own, int64_t first, Running<float>& sum,
                            Best& best) {
  if (has_own | (largest(best.value, v) > best.value)) {
#pragma unroll
    for (int l = 0; l < N; ++l)
      if (column(l) == own) v[l] = -INFINITY;
    const float top = largest(best.value, v), shift = kFixed ? sum.shift : fmaxf(sum.shift, top);
    if (!kFixed) sum = {shift, sum.sum * rescale(sum.shift, shift)};
#pragma unroll
    for (int l = N - 1; l >= 0; --l)
      if (top > best.value && v[l] == top) best.class_index = first + column(l);
    best.value = top;
  }
#pragma unroll
  for (int l = 0; l < N; ++l) {
    v[l] = fast_exp(v[l] - sum.shift);
    sum.sum += v[l];
  }
}

template <bool kPlain, typename K>
__device__ inline void scan(const Logits& z, const Classes& c, const Part& p, Running<float>& sum, Best& best,
                            const K& keep) {
  const float *row = z.z + p.row * c.n, *scale = z.residual_scale;
  const auto single = [&](int j) {
    float v[1] = {logit(z, c, p, j)};
    take<K::kKeeps>(v, [&](int) { return j; }, p.own, j == p.own, c.first, sum, best);
    keep.one(j, v[0] * scale[j]);
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
    take<K::kKeeps>(v, column, p.own, has_own, c.first, sum, best);
#pragma unroll
    for (int l = 0; l < 4 * N; ++l) v[l] *= s[l];
#pragma unroll
    for (int q = 0; q < N; ++q) keep.template quad<kPlain>(j + q * kNext, v + 4 * q);
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

// A block's part of a row: adds to its sum and to its list.
template <typename K>
__device__ inline void search(const Logits& z, const Classes& c, const RowState& s, const Part& p, bool plain,
                              Running<float> sum, const K& keep) {
  __shared__ Running<float> sums[kWarps];
  __shared__ Best bests[kWarps];
  const int64_t i = blockIdx.x;
  Best mine = {-INFINITY, INT64_MAX};
  plain ? scan<true>(z, c, p, sum, mine, keep) : scan<false>(z, c, p, sum, mine, keep);
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

__global__ void nontarget_lse_fwd_kernel(Logits z, Classes c, RowState s, int parts) {
  const Part p = part_of(z, c, int(classes_in(c)), parts);
  search(z, c, s, p, is_plain(z, c, p), {kNoShift, 0.0f}, KeepNone());
}

// The same with one fixed shift for all rows and chunks.
template <typename Stored>
__global__ void nontarget_lse_keep_kernel(Logits z, Classes c, RowState s, int parts, float offset, Kept kept) {
  const Part p = part_of(z, c, int(classes_in(c)), parts);
  Stored* e = static_cast<Stored*>(kept.e) + p.row * kept.pitch + c.first;
  search(z, c, s, p, is_plain(z, c, p) && p.head == 0, {offset, 0.0f}, KeepIn<Stored>{e});
  for (int j = p.n + int(threadIdx.x); p.first && j < c.n; j += kThreads)
    e[j] = rounded(0.0f, Stored());  // no class there
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

int launch_nontarget_lse_keep(OperandType type, const Logits& z, const Classes& c, const RowState& s, float offset,
                              const Kept& kept, void* stream) {
  const auto kernel = type == OperandType::kBf16 ? nontarget_lse_keep_kernel<Bf16> : nontarget_lse_keep_kernel<float>;
  return launch(kernel, z.B * parts_of(z.B), stream, z, c, s, parts_of(z.B), offset, kept);
}

int launch_merge_parts(const RowState& s, int64_t B, float* rest, float* topk_values, int64_t* topk_classes,
                       void* stream) {
  return launch(merge_parts_kernel, B, stream, s, parts_of(B), rest, topk_values, topk_classes);
}

}  // namespace fastmargin
