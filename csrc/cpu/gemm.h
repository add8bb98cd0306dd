// One thread's matrix product inside a parallel region.
//
// brgemm is oneDNN's kernel for blocks that fit the cache; on AVX-512 machines it runs float32 at more than twice the
// rate of a BLAS call, and elsewhere it makes one. It knows no float64: those products go through ATen.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <type_traits>

namespace fastmargin {

// Worker threads inherit neither grad mode nor autocast: below both, whatever the caller's state.
struct PlainAten {
  at::AutoDispatchBelowAutograd below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

// c [m, n] = a [m, k] b [k, n], or += ; row-major with leading dimensions
template <typename T>
void gemm(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
          bool add) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if constexpr (std::is_same_v<T, float>) return at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c);
#endif
  const PlainAten guard;
  const auto dtype = c10::CppTypeToScalarType<T>::value;
  const auto A = at::from_blob(const_cast<T*>(a), {m, k}, {lda, 1}, dtype);
  const auto B = at::from_blob(const_cast<T*>(b), {k, n}, {ldb, 1}, dtype);
  auto C = at::from_blob(c, {m, n}, {ldc, 1}, dtype);
  if (add) {
    at::addmm_out(C, C, A, B);
  } else {
    at::mm_out(C, A, B);
  }
}

}  // namespace fastmargin
