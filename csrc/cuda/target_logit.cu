// target_logit on a GPU: a warp a row. The formula is in fastmargin/ops/target_logit.py.
#include "classes.cuh"

namespace fastmargin {
namespace {

__global__ void target_logit_kernel(Classes c, const float* x /* [B, d] */, const int64_t* y /* [B] */, int64_t B,
                                    float* target /* [B] */) {
  const int64_t i = warp_of_grid(), lane = threadIdx.x % kWarp;
  if (i >= B) return;
  const bool here = has_class(c, y[i]);
  const float* w = here ? row_of(c, y[i]) : nullptr;
  float sum = 0;
  for (int64_t f = lane; here && f < c.d; f += kWarp) sum += x[i * c.d + f] * w[f * c.column];
  sum = over_warp(sum, [](float a, float b) { return a + b; });
  const float scale = here && c.normalize ? inverse_norm(w, c) : 1.0f;
  if (lane == 0) target[i] = here ? sum * scale + (c.bias ? c.bias[id_of(c, y[i])] : 0.0f) : 0.0f;
}

}  // namespace

int launch_target_logit(const Classes& c, const float* x, const int64_t* y, int64_t B, float* target, void* stream) {
  return launch(target_logit_kernel, blocks_of(B), stream, c, x, y, B, target);
}

}  // namespace fastmargin
