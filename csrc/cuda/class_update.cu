// Optimiser steps of class weights on a GPU: a warp a class. The rules are in csrc/class_update.h.
#include "block.cuh"
#include "classes.cuh"
#include "launch.h"

namespace fastmargin {
namespace {

__device__ inline int64_t offset_of(const ClassStates& s, int64_t place) {
  return (s.rows ? s.rows[place] : place) * s.d;
}

// Places first .. first + n. With a scale, a class whose gradient is not finite stays as it is.
template <typename Rule>
__global__ void class_update_kernel(Rule rule, ClassStates s, const float* g /* [n, d] */, int64_t first, int64_t n) {
  const int64_t j = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (j >= n) return;
  const int64_t at = offset_of(s, first + j);
  const float factor = s.grad_scale ? 1.0f / *s.grad_scale : 1.0f;
  float lost = 0;
  for (int64_t f = lane; s.grad_scale && f < s.d; f += kWarp) lost += g[j * s.d + f] * factor * 0.0f;
  if (over_warp(lost, [](float a, float b) { return a + b; }) != 0.0f) return;
  for (int64_t f = lane; f < s.d; f += kWarp) {
    float one = s.first ? s.first[at + f] : 0.0f, two = s.second ? s.second[at + f] : 0.0f;
    rule.step(s.w[at + f], one, two, g[j * s.d + f] * factor);
    if (s.first) s.first[at + f] = one;
    if (s.second) s.second[at + f] = two;
  }
}

// (first, w) := p (first, w)
__global__ void class_catch_up_kernel(ClassStates s, const float* p /* [n, 4] */, int64_t n) {
  const int64_t j = warp_of_grid();
  if (j >= n) return;
  const int64_t at = offset_of(s, j);
  const float vv = p[4 * j], vw = p[4 * j + 1], wv = p[4 * j + 2], ww = p[4 * j + 3];
  for (int64_t f = threadIdx.x % kWarp; f < s.d; f += kWarp) {
    const float v = s.first ? s.first[at + f] : 0.0f, w = s.w[at + f];
    if (s.first) s.first[at + f] = vv * v + vw * w;
    s.w[at + f] = wv * v + ww * w;
  }
}

}  // namespace

int launch_class_update(const Sgd& rule, const ClassStates& s, const float* g, int64_t first, int64_t n, void* stream) {
  return launch(class_update_kernel<Sgd>, blocks_of(n), stream, rule, s, g, first, n);
}

int launch_class_update(const AdamW& rule, const ClassStates& s, const float* g, int64_t first, int64_t n,
                        void* stream) {
  return launch(class_update_kernel<AdamW>, blocks_of(n), stream, rule, s, g, first, n);
}

int launch_class_catch_up(const ClassStates& s, const float* products, int64_t n, void* stream) {
  return launch(class_catch_up_kernel, blocks_of(n), stream, s, products, n);
}

}  // namespace fastmargin
