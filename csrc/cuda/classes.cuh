// Class weights as the caller gave them: any strides, all classes or a selection. A warp works on one of them.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace fastmargin {

static __device__ inline int64_t id_of(const Classes& c, int64_t place) {
  return c.class_ids ? c.class_ids[place] : place;
}

static __device__ inline const float* row_of(const Classes& c, int64_t place) { return c.w + id_of(c, place) * c.row; }

// 1 / ||w||, 0 below 1e-12, of the squares that the lanes of a warp have summed.
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
