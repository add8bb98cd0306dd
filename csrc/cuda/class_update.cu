// Optimizer steps of class weights on a GPU, one warp per class. The rules are in csrc/optimizer_step.h. Where there is
// an operand cache (fastmargin/ops/operand_cache.py), the step also writes it, in the same pass over the row.
#include "block.cuh"
#include "classes.cuh"
#include "launch.h"
#include "operand.cuh"

namespace fastmargin {
namespace {

// Where the row of a class index begins; negative: no class.
__device__ inline int64_t offset_of(const ClassStates& s, int64_t index) {
  return (s.class_ids ? s.class_ids[index] : index) * s.d;
}

constexpr int kHeld = 16;  // numbers of the new row that a lane keeps in registers: for d <= 512 none is read again

// Steps n classes from class index `first`. With a grad_scale, a class whose gradient is not finite keeps its weights,
// states and cached operands. The cache holds all classes, as operands of type O; O = float: there is no cache.
template <typename Rule, typename O>
__global__ void class_update_kernel(Rule rule, ClassStates s, OperandCache cache, const float* g /* [n, d] */,
                                    int64_t first, int64_t n) {
  const int64_t j = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (j >= n) return;
  const int64_t at = offset_of(s, first + j), tail = lane + kHeld * kWarp;
  if (at < 0) return;
  const float inverse_grad_scale = s.grad_scale ? 1.0f / *s.grad_scale : 1.0f;
  float not_finite = 0;  // stays 0 if all numbers are finite, else becomes NaN
  for (int64_t f = lane; s.grad_scale && f < s.d; f += kWarp) not_finite += g[j * s.d + f] * inverse_grad_scale * 0.0f;
  if (over_warp(not_finite, [](float a, float b) { return a + b; }) != 0.0f) return;
  float held[kHeld], squares = 0;
  const auto step = [&](int64_t f) {
    float w = s.w[at + f], one = s.first ? s.first[at + f] : 0.0f, two = s.second ? s.second[at + f] : 0.0f;
    rule.step(w, one, two, g[j * s.d + f] * inverse_grad_scale);
    s.w[at + f] = w;
    if (s.first) s.first[at + f] = one;
    if (s.second) s.second[at + f] = two;
    squares += w * w;
    return w;
  };
#pragma unroll
  for (int l = 0; l < kHeld; ++l)
    if (lane + l * kWarp < s.d) held[l] = step(lane + l * kWarp);
  for (int64_t f = tail; f < s.d; f += kWarp) step(f);
  if constexpr (rounds<O>()) {
    O* o = static_cast<O*>(cache.o) + at;
    float residual_scale;
    const float exponent_scale = split_scale<O>(cache.normalize ? inverse_root(squares) : 1.0f, residual_scale);
#pragma unroll
    for (int l = 0; l < kHeld; ++l)
      if (lane + l * kWarp < s.d) o[lane + l * kWarp] = rounded(held[l] * exponent_scale, O());
    for (int64_t f = tail; f < s.d; f += kWarp) o[f] = rounded(s.w[at + f] * exponent_scale, O());
    if (lane != 0) return;
    cache.exponent_scale[first + j] = exponent_scale;
    cache.residual_scale[first + j] = residual_scale;
  }
}

// (first, w) := p (first, w)
__global__ void class_lazy_update_kernel(ClassStates s, const float* p /* [n, 4] */, int64_t n) {
  const int64_t j = warp_of_grid();
  if (j >= n) return;
  const int64_t at = offset_of(s, j);
  const float vv = p[4 * j], vw = p[4 * j + 1], wv = p[4 * j + 2], ww = p[4 * j + 3];
  if (at < 0 || (vv == 1.0f && vw == 0.0f && wv == 0.0f && ww == 1.0f)) return;  // no class, or up to date
  for (int64_t f = threadIdx.x % kWarp; f < s.d; f += kWarp) {
    const float v = s.first ? s.first[at + f] : 0.0f, w = s.w[at + f];
    if (s.first) s.first[at + f] = vv * v + vw * w;
    s.w[at + f] = wv * v + ww * w;
  }
}

template <typename Rule>
int launch_update(const Rule& rule, const ClassStates& s, const OperandCache& cache, const float* g, int64_t first,
                  int64_t n, void* stream) {
  return with_operand(cache.type, [&](auto t) {
    return launch(class_update_kernel<Rule, decltype(t)>, blocks_of(n), stream, rule, s, cache, g, first, n);
  });
}

}  // namespace

int launch_class_update(const Sgd& rule, const ClassStates& s, const OperandCache& cache, const float* g, int64_t first,
                        int64_t n, void* stream) {
  return launch_update(rule, s, cache, g, first, n, stream);
}

int launch_class_update(const AdamW& rule, const ClassStates& s, const OperandCache& cache, const float* g,
                        int64_t first, int64_t n, void* stream) {
  return launch_update(rule, s, cache, g, first, n, stream);
}

int launch_class_lazy_update(const ClassStates& s, const float* products, int64_t n, void* stream) {
  return launch(class_lazy_update_kernel, blocks_of(n), stream, s, products, n);
}

}  // namespace fastmargin
