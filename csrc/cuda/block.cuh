// Reductions over a warp and over a block, and how kernels are launched.
#pragma once

#include <cuda_runtime.h>

#include "../tile.h"

namespace fastmargin {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / kWarp;

// A candidate of a top-k search.
struct Best {
  float value;
  int64_t class_index;
};

// Whether a comes before b: larger values first, equal ones by the smaller class index.
FM_INLINE bool before(const Best& a, const Best& b) {
  return a.value > b.value || (a.value == b.value && a.class_index < b.class_index);
}

static __device__ inline float shuffled(float v, int lane) { return __shfl_xor_sync(0xffffffffu, v, lane); }
static __device__ inline int64_t shuffled(int64_t v, int lane) {
  return __shfl_xor_sync(0xffffffffu, static_cast<long long>(v), lane);
}
static __device__ inline Best shuffled(const Best& v, int lane) {
  return {shuffled(v.value, lane), shuffled(v.class_index, lane)};
}
static __device__ inline Running<float> shuffled(const Running<float>& v, int lane) {
  return {shuffled(v.shift, lane), shuffled(v.sum, lane)};
}

// Reduces the values of a warp's lanes; every lane gets the result. `merge` must be commutative bit for bit, so that
// all lanes get the same bits.
template <typename V, typename F>
static __device__ inline V over_warp(V v, const F& merge) {
  for (int lane = kWarp / 2; lane > 0; lane /= 2) v = merge(v, shuffled(v, lane));
  return v;
}

// The same over a block. `scratch` is in shared memory; a barrier must stand between two uses of it.
template <typename V, typename F>
static __device__ inline V over_block(V v, V* scratch /* [kWarps] */, const F& merge) {
  v = over_warp(v, merge);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = v;
  __syncthreads();
  v = scratch[0];
  for (int i = 1; i < kWarps; ++i) v = merge(v, scratch[i]);
  return v;
}

// The index of this warp in the grid: the class or row that it works on.
static __device__ inline int64_t warp_of_grid() { return int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

inline int64_t blocks_of(int64_t warps) { return (warps + kWarps - 1) / kWarps; }

template <typename... Params, typename... Args>
int launch(void (*kernel)(Params...), int64_t blocks, void* stream, const Args&... args) {
  if (blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

}  // namespace fastmargin
