// Reads class weights with any strides, all classes or those of class_ids. A warp works on one class.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace fastmargin {

// The row of w of a class index.
static __device__ inline int64_t id_of(const Classes& c, int64_t index) {
  return c.class_ids ? c.class_ids[index] : index;
}

// Whether there is a class at a class index: class_ids may end in -1.
static __device__ inline bool has_class(const Classes& c, int64_t index) {
  return index >= 0 && index < c.all && id_of(c, index) >= 0;
}

// How many places of the chunk have a class: the first ones.
static __device__ inline int64_t classes_in(const Classes& c) {
  const int64_t left = c.count ? *c.count - c.first : c.n;
  return left < 0 ? 0 : left < c.n ? left : c.n;
}

static __device__ inline const float* row_of(const Classes& c, int64_t index) { return c.w + id_of(c, index) * c.row; }

// 1 / ||w||, 0 for ||w|| < 1e-12, from each lane's partial sum of squares.
static __device__ inline float inverse_root(float squares) {
  const float norm = sqrtf(over_warp(squares, [](float a, float b) { return a + b; }));
  return norm < 1e-12f ? 0.0f : 1.0f / norm;
}

// 1 / ||w||; the lanes of a warp share the work.
static __device__ inline float inverse_norm(const float* w, const Classes& c) {
  float squares = 0;
  for (int64_t f = threadIdx.x % kWarp; f < c.d; f += kWarp) squares += w[f * c.column] * w[f * c.column];
  return inverse_root(squares);
}

}  // namespace fastmargin
