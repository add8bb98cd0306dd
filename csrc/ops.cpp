// Op schemas, and the facts of this build. Implementations are registered in csrc/cpu/<stem>.cpp, csrc/cuda/device.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <map>
#include <string>

#include "cpu/capability.h"

TORCH_LIBRARY(fastmargin, m) {
  m.def("target_logit(Tensor x, Tensor w, Tensor y, Tensor? bias, Tensor? class_ids, bool normalize_weight) -> Tensor");
  m.def(
      "nontarget_lse_fwd(Tensor x, Tensor w, Tensor y, Tensor? bias, Tensor? class_ids, Tensor? bend, bool "
      "normalize_weight, int pool, int topk, ScalarType? compute_dtype, bool need_expected_weight, Tensor? "
      "operands=None, Tensor? scales=None, bool keep_exponentials=False) -> (Tensor rest, Tensor topk_values, Tensor "
      "topk_classes, Tensor expected_weight, Tensor exponentials)");
  m.def(
      "nontarget_lse_bwd(Tensor x, Tensor w, Tensor y, Tensor? bias, Tensor? class_ids, Tensor? bend, bool "
      "normalize_weight, int pool, ScalarType? compute_dtype, Tensor rest, Tensor topk_classes, Tensor "
      "expected_weight, Tensor exponentials, Tensor d_rest, Tensor d_target, Tensor? d_topk, bool need_dx, bool "
      "need_dw, bool need_db) -> (Tensor dx, Tensor dw, Tensor db)");
  m.def(
      "nontarget_lse_bwd_update(Tensor x, Tensor(a!) w, Tensor y, Tensor? bias, Tensor? class_ids, Tensor? bend, bool "
      "normalize_weight, int pool, ScalarType? compute_dtype, Tensor rest, Tensor topk_classes, Tensor "
      "expected_weight, Tensor exponentials, Tensor d_rest, Tensor d_target, Tensor? d_topk, bool need_dx, bool "
      "need_db, Tensor(b!)[] state, str rule, float[] hyper, Tensor? grad_scale, Tensor(c!)? operands=None, "
      "Tensor(d!)? "
      "scales=None) -> (Tensor dx, Tensor db)");
  m.def(
      "class_update(Tensor(a!) w, Tensor(b!)[] state, Tensor grad, Tensor? class_ids, str rule, float[] hyper, Tensor? "
      "grad_scale) -> ()");
  m.def("class_operands(Tensor w, bool normalize_weight, Tensor(a!) operands, Tensor(b!) scales) -> ()");
  m.def("class_lazy_update(Tensor(a!) w, Tensor(b!)? v, Tensor? class_ids, Tensor products) -> ()");
  m.def(
      "pairwise_potential_fwd(Tensor a, Tensor? b, Tensor a_ids, Tensor? b_ids, Tensor? b_weight, str kind, float "
      "margin, bool want_slope) -> (Tensor potential, Tensor slope)");
}

#ifdef FASTMARGIN_CUDA
constexpr const char* devices = "cpu cuda";
#else
constexpr const char* devices = "cpu";
#endif

PYBIND11_MODULE(_C, m) {
  m.def("build_facts", [] {
    return std::map<std::string, std::string>{
        {"torch", FASTMARGIN_TORCH_VERSION},
        {"devices", devices},
        {"cpu", fastmargin::cpu_kernels()},
        {"compute", fastmargin::cpu_computes_bfloat16() ? "bfloat16" : ""},  // operand types narrower than float32
    };
  });
}
