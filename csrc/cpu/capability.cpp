// Chooses the kernel object that runs on this machine: the capability ATen chose (ATEN_CPU_CAPABILITY can lower it).
#include "capability.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <type_traits>

#include "class_update_kernel.h"
#include "gemm.h"
#include "nontarget_lse_kernel.h"
#include "pairwise_potential_kernel.h"

namespace fastmargin {

#define FM_TABLES(CAPABILITY)                                                 \
  extern const NontargetLseKernels<float> nontarget_lse_float_##CAPABILITY;   \
  extern const NontargetLseKernels<double> nontarget_lse_double_##CAPABILITY; \
  extern const PairKernels<float> pair_kernels_float_##CAPABILITY;            \
  extern const PairKernels<double> pair_kernels_double_##CAPABILITY;          \
  extern const ClassUpdateKernels<float> class_update_float_##CAPABILITY;     \
  extern const ClassUpdateKernels<double> class_update_double_##CAPABILITY;
FM_TABLES(DEFAULT)
#ifdef FASTMARGIN_X86
FM_TABLES(AVX2)
FM_TABLES(AVX512)
extern const NontargetLseKernels<Bf16> nontarget_lse_bfloat16_AVX512;
#endif

std::string cpu_kernels() {
#ifdef FASTMARGIN_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512" || capability == "AVX2") return capability;
#endif
  return "DEFAULT";
}

namespace {

// The environment may limit oneDNN to less than the CPU has: one small product finds out.
bool multiplies_bfloat16() {
  constexpr int64_t n = 16, k = 2;
  const Bf16 one = Bf16(bf16_bits(1.f) >> 16), three = Bf16(bf16_bits(3.f) >> 16);
  alignas(uint32_t) Bf16 a[n * k], b[n * k];
  float c[n * n];
  for (int64_t i = 0; i < n; ++i) {
    a[i * k] = b[i * k + 1] = one;
    a[i * k + 1] = b[i * k] = three;
  }
  try {
    gemm(n, n, k, a, k, reinterpret_cast<const uint32_t*>(b), n, c, n, false);
    release<Bf16>();
  } catch (const std::exception&) {
    return false;
  }
  for (float value : c)
    if (value != 6.f) return false;
  return true;
}

}  // namespace

bool cpu_computes_bfloat16() {
#ifdef FASTMARGIN_X86
  static const bool answer = cpu_kernels() == "AVX512" && __builtin_cpu_supports("avx512bf16") && multiplies_bfloat16();
  return answer;
#else
  return false;
#endif
}

// The table of this machine's capability for type T, float or double.
#define FM_PICK(name, CAPABILITY)                                               \
  if (capability == #CAPABILITY) {                                              \
    if constexpr (std::is_same_v<T, float>) return name##_float_##CAPABILITY;   \
    if constexpr (std::is_same_v<T, double>) return name##_double_##CAPABILITY; \
  }
#ifdef FASTMARGIN_X86
#define FM_PICK_ANY(name) FM_PICK(name, AVX512) FM_PICK(name, AVX2) FM_PICK(name, DEFAULT)
#else
#define FM_PICK_ANY(name) FM_PICK(name, DEFAULT)
#endif

template <typename T>
const NontargetLseKernels<T>& nontarget_lse_kernels() {
  static const std::string capability = cpu_kernels();
#ifdef FASTMARGIN_X86
  if constexpr (std::is_same_v<T, Bf16>) return nontarget_lse_bfloat16_AVX512;
#endif
  FM_PICK_ANY(nontarget_lse)
  TORCH_INTERNAL_ASSERT(false);
}

template <typename T>
const PairKernels<T>& pair_kernels() {
  static const std::string capability = cpu_kernels();
  FM_PICK_ANY(pair_kernels)
  TORCH_INTERNAL_ASSERT(false);
}

template <typename T>
const ClassUpdateKernels<T>& class_update_kernels() {
  static const std::string capability = cpu_kernels();
  FM_PICK_ANY(class_update)
  TORCH_INTERNAL_ASSERT(false);
}

template const NontargetLseKernels<float>& nontarget_lse_kernels<float>();
template const NontargetLseKernels<double>& nontarget_lse_kernels<double>();
template const NontargetLseKernels<Bf16>& nontarget_lse_kernels<Bf16>();
template const PairKernels<float>& pair_kernels<float>();
template const PairKernels<double>& pair_kernels<double>();
template const ClassUpdateKernels<float>& class_update_kernels<float>();
template const ClassUpdateKernels<double>& class_update_kernels<double>();

}  // namespace fastmargin
