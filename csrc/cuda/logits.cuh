// How kernels read a chunk of logits, block by block: the parts of a row, in quads.
#pragma once

#include "block.cuh"
#include "classes.cuh"
#include "launch.h"
#include "operand.cuh"

namespace fastmargin {

// A block's part of a row of z: quads, four columns whose logits lie on 16 bytes, and whose E does on those of a quad
// of E, since z and E begin memory of their own. The first part also has the columns before and behind all quads, up to
// three each.
struct Part {
  int64_t row;
  int own;            // the row's own column, or -1
  int begin, end;     // first columns of the part's quads, and their end
  int head, tail, n;  // columns before `head`, and from `tail` to n, are no quads
  bool first;
};

static __device__ inline Part part_of(const Logits& z, const Classes& c, int n, int parts) {
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
static __device__ inline void each_single(const Part& p, int from, int to, const F& f) {
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
static __device__ inline void each_quad(const Part& p, const F& f) {
  int j = p.begin + 4 * int(threadIdx.x);
  for (; j + kNext < p.end; j += kAtOnce * kNext) f(j, Quads<kAtOnce>());
  if (j < p.end) f(j, Quads<1>());
}

template <bool kPlain>
static __device__ inline float logit(float product, float scale, const Classes& c, int j) {
  return kPlain || !c.bias ? product * scale : product * scale + c.bias[id_of(c, c.first + j)];
}

// Whether all quads of scales lie on 16 bytes, as those of z do, and there is no bias: the loop that counts.
static __device__ inline bool is_plain(const Logits& z, const Classes& c, const Part& p) {
  return !c.bias && reinterpret_cast<uintptr_t>(z.residual_scale + p.head) % sizeof(Quad) == 0;
}

// Loads N quads of products and of scales.
template <bool kPlain, int N>
static __device__ inline void load(const float* z /* [n] */, const float* scale /* [n] */, int j, float (&v)[4 * N],
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

static __device__ inline float logit(const Logits& z, const Classes& c, const Part& p, int j) {
  return logit<false>(z.z[p.row * c.n + j], z.residual_scale[j], c, j);
}

}  // namespace fastmargin
