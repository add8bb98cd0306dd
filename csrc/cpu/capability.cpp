// Which of the kernel objects runs on this machine: the one ATen chose for itself (ATEN_CPU_CAPABILITY lowers it).
#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <string>
#include <type_traits>

#include "nontarget_lse_kernel.h"

namespace fastmargin {

#define FM_TABLES(CAPABILITY)                                               \
  extern const NontargetLseKernels<float> nontarget_lse_float_##CAPABILITY; \
  extern const NontargetLseKernels<double> nontarget_lse_double_##CAPABILITY;
FM_TABLES(DEFAULT)
#ifdef FASTMARGIN_X86
FM_TABLES(AVX2)
FM_TABLES(AVX512)
#endif

std::string cpu_kernels() {
#ifdef FASTMARGIN_X86
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512" || capability == "AVX2") return capability;
#endif
  return "DEFAULT";
}

template <typename T>
const NontargetLseKernels<T>& nontarget_lse_kernels() {
  static const std::string capability = cpu_kernels();
#define FM_PICK(CAPABILITY)                                                            \
  if (capability == #CAPABILITY) {                                                     \
    if constexpr (std::is_same_v<T, float>) return nontarget_lse_float_##CAPABILITY;   \
    if constexpr (std::is_same_v<T, double>) return nontarget_lse_double_##CAPABILITY; \
  }
#ifdef FASTMARGIN_X86
  FM_PICK(AVX512)
  FM_PICK(AVX2)
#endif
  FM_PICK(DEFAULT)
  TORCH_INTERNAL_ASSERT(false);
}

template const NontargetLseKernels<float>& nontarget_lse_kernels<float>();
template const NontargetLseKernels<double>& nontarget_lse_kernels<double>();

}  // namespace fastmargin
