// One thread's matrix product inside a parallel region.
//
// brgemm is oneDNN's kernel for blocks that fit the cache; on AVX-512 machines it runs float32 at more than twice the
// rate of a BLAS call, and on others it makes one. It has no float64: those products go through ATen.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "nontarget_lse_kernel.h"

#if !defined(CPUBLAS_BRGEMM_F32F32F32) || !defined(CPUBLAS_BRGEMM_BF16BF16F32)
#error "fastmargin wants a torch whose ATen/native/CPUBlas.h has brgemm for float32 and bfloat16 (2.11 or later)"
#endif

namespace fastmargin {

// Worker threads inherit neither grad mode nor autocast: this switches both off, whatever the caller's state.
struct PlainAten {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// oneDNN compiles and keeps a kernel for every shape it meets: sizes are padded to multiples of this, so that there are
// few shapes, whatever the batch sizes.
constexpr int64_t kPad = 16;

inline int64_t padded_count(int64_t n) { return (n + kPad - 1) / kPad * kPad; }

// c [m, n] = a [m, k] b [k, n], or +=; row-major with leading dimensions. b of bfloat16 is in VNNI layout: [k / 2, n]
// words of two.
inline void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c);
}

inline void gemm(int64_t m, int64_t n, int64_t k, const Bf16* a, int64_t lda, const uint32_t* b, int64_t ldb, float* c,
                 int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, reinterpret_cast<const at::BFloat16*>(a),
                              reinterpret_cast<const at::BFloat16*>(b), c, /*is_vnni=*/true);
}

inline void gemm(int64_t m, int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c,
                 int64_t ldc, bool add) {
  const PlainAten guard;
  const auto A = at::from_blob(const_cast<double*>(a), {m, k}, {lda, 1}, at::kDouble);
  const auto B = at::from_blob(const_cast<double*>(b), {k, n}, {ldb, 1}, at::kDouble);
  auto C = at::from_blob(c, {m, n}, {ldc, 1}, at::kDouble);
  if (add) {
    at::addmm_out(C, C, A, B);
  } else {
    at::mm_out(C, A, B);
  }
}

// Ends a thread's products. bfloat16 ones may use AMX tiles, which stay configured until they are released.
template <typename O>
void release() {
  if constexpr (Operand<O>::lanes > 1) at::native::cpublas::brgemm_release();
}

}  // namespace fastmargin
