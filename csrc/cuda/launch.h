// The launchers of the kernels: they take raw pointers, sizes, a stream. No torch header, so nvcc compiles them on any
// machine. Every launcher returns cudaSuccess (0) or the error of the launch.
#pragma once

#include <cstdint>

#include "../optimizer_step.h"
#include "../pairwise_potential.h"

namespace fastmargin {

enum class OperandType { kFloat, kBf16, kHalf };  // of the matrix products

// The weights, and one chunk of classes: `n` of them from class index `first`. A class index counts in class_ids where
// the caller gave them, else in w. class_ids may end in -1, no class: of these places no kernel reads or writes a row,
// and their gradient is 0.
struct Classes {
  const float* w;            // [C, d] with strides
  int64_t row, column;       // strides of w, in elements
  const float* bias;         // [C], or null
  const int64_t* class_ids;  // [all] ids, or null
  const int64_t* count;      // [] how many of class_ids are a class, or null: all places are
  int64_t all;               // classes in w, or in class_ids
  int64_t d;                 //
  bool normalize;            //
  int64_t first, n;          // of this chunk
};

// The products of all rows with the operands of one chunk. The logit is z * residual_scale_j + bias_j.
struct Logits {
  float* z;                     // [B, n]
  int64_t B;                    //
  const int64_t* y;             // [B] class indices; out of range: the row has no class here
  const float* residual_scale;  // [n]
};

#ifndef FASTMARGIN_MULTIPROCESSORS
#define FASTMARGIN_MULTIPROCESSORS 132
#endif
constexpr int64_t kMultiprocessors = FASTMARGIN_MULTIPROCESSORS;  // of an H200
constexpr int64_t kMostParts = 16;  // of a row: with more, a block would have less than a quad a thread

// Into how many parts, a block each, a row of a chunk is cut, so that few rows keep a GPU busy, too.
inline int64_t parts_of(int64_t B) {
  int64_t parts = 1;
  while (parts < kMostParts && parts * B < kMultiprocessors) parts *= 2;
  return parts;
}

// Per part of a row, over the chunks so far: the k largest logits, and log-sum-exp as shift + log(sum).
struct RowState {
  float* shift;           // [B, parts]
  float* sum;             // [B, parts]
  float* topk_values;     // [B, parts, k]
  int64_t* topk_classes;  // [B, parts, k] class indices
  int64_t k;
};

// d_target and d_topk, sorted by class.
struct Entries {
  const int64_t* class_index;  // [m]
  const int64_t* row;          // [m]
  const float* value;          // [m]
  int64_t m;
};

// x, and the incoming gradients.
struct Upstream {
  const float* x;               // [B, d]
  const float* rest;            // [B]
  const float* d_rest;          // [B]
  const float* d_target;        // [B]
  const float* d_topk;          // [B, k], or null
  const int64_t* topk_classes;  // [B, k]
  int64_t k;                    //
};

// What exponentials are multiplied by.
struct RowScales {
  float* offset;    // [B] of z, +inf where there is no other class; not of kept exponentials
  float* c;         // [B] of the rows of x, for dw
  float* dx_scale;  // [B] of dx
  float* lift;      // [1] that dw and db are divided by
};

// Exponentials kept from the forward pass, in the operands' type.
struct Kept {
  void* e;        // [B, pitch]
  int64_t pitch;  //
};

// Class weights and their optimizer states, of which a rule may use fewer; all may change.
struct ClassStates {
  float* w;                  // [C, d]
  float *first, *second;     // [C, d] each, or null
  const int64_t* class_ids;  // [n] ids of the classes that change, -1: none; or null: all
  const float* grad_scale;   // [] or null
  int64_t d;
};

// The operands of all classes, kept from one pass to the next; an update also writes those of the classes it changes.
struct OperandCache {
  OperandType type;
  void* o;                                 // [C, d], or null: no cache
  float *exponent_scale, *residual_scale;  // [C] each
  bool normalize;
};

// o_j = w_j * exponent_scale_j, rounded, where exponent_scale_j is a power of two, residual_scale_j is in [1, 2) and
// their product is 1 / ||w_j||. For float operands exponent_scale is 1, and o may be null.
int launch_operands(OperandType type, const Classes& c, void* o /* [n, d] */, float* exponent_scale /* [n] */,
                    float* residual_scale /* [n] */, void* stream);

int launch_nontarget_lse_fwd(const Logits& z, const Classes& c, const RowState& s, void* stream);

// The same with exp(z - offset), which it also stores, times residual_scale, 0 at the targets; s.shift is the offset.
// The type is bfloat16 or float.
int launch_nontarget_lse_keep(OperandType type, const Logits& z, const Classes& c, const RowState& s, float offset,
                              const Kept& kept, void* stream);

// rest = shift + log(sum) of all parts, and the k largest of their lists, in order; classes of no candidate stay as
// given
int launch_merge_parts(const RowState& s, int64_t B, float* rest /* [B] */, float* topk_values /* [B, k] */,
                       int64_t* topk_classes /* [B, k] */, void* stream);

// The scales of exponentials made again or, where kept_offset (on the host) is not null, of kept ones.
int launch_row_scales(OperandType type, const Upstream& u, int64_t B, const float* kept_offset, const RowScales& out,
                      void* stream);

// E_ij = exp(z_ij - offset_i) residual_scale_j, 0 at the targets; float E may overwrite z
int launch_nontarget_lse_bwd(OperandType type, const Logits& z, const Classes& c, const float* offset /* [B] */,
                             void* e /* [B, n] */, void* stream);

// Turns sum_i E_ij c_i x_i in dw into the gradient: divides by lift, adds the entries, projects. Likewise db, if not
// null.
int launch_weight_gradient(OperandType type, const Classes& c, const Upstream& u, const Entries& e,
                           const float* lift /* [1] */, float* dw /* [n, d] or null */, float* db /* [n] or null */,
                           void* stream);

// dx_i = the gradients of its target and of its top-k, times the unit weights of these classes
int launch_row_gradient(const Classes& c, const Upstream& u, const int64_t* y /* [B] */, int64_t B,
                        float* dx /* [B, d] */, void* stream);

// dx_i += scale_i * sum over splits
int launch_add_splits(const float* splits, int64_t count /* splits [count, B, d] */, int64_t B, int64_t d,
                      const float* scale /* [B] */, float* dx /* [B, d] */, void* stream);

int launch_class_update(const Sgd& rule, const ClassStates& s, const OperandCache& cache, const float* g /* [n, d] */,
                        int64_t first, int64_t n, void* stream);
int launch_class_update(const AdamW& rule, const ClassStates& s, const OperandCache& cache, const float* g /* [n, d] */,
                        int64_t first, int64_t n, void* stream);
int launch_class_lazy_update(const ClassStates& s, const float* products /* [n, 4] */, int64_t n, void* stream);

int launch_target_logit(const Classes& c, const float* x /* [B, d] */, const int64_t* y /* [B] */, int64_t B,
                        float* target /* [B] */, void* stream);

// One side of a chunk of pairs of points.
struct Points {
  const float* given;     // [n, d]
  const int64_t* id;      // [n]
  const float* weight;    // [n], or null: 1
  const float* centered;  // [n, d] the mean of all b subtracted
  const float* squares;   // [n] squared norms of centered
  int64_t n, d;
};

// Sums over all columns for the rows of a chunk.
struct PairSums {
  double* potential;    // [n]
  double* coefficient;  // [n] of 2 phi'
  float* slope;         // [n, d], or null: not needed
};

// centered_i = given_i - mean, and its squared norm
int launch_center(const float* given /* [n, d] */, const float* mean /* [d] */, int64_t n, int64_t d,
                  float* centered /* [n, d] */, float* squares /* [n] */, void* stream);

// Replaces the products of a and b in u by -2 phi' weight_j; by 0 for near pairs, whose slopes are added at once. Adds
// to the sums of potentials and coefficients.
int launch_pairwise_potential(const Inverse& phi, const Points& a, const Points& b, float* u /* [a.n, b.n] */,
                              const PairSums& sums, void* stream);
int launch_pairwise_potential(const Hinge& phi, const Points& a, const Points& b, float* u /* [a.n, b.n] */,
                              const PairSums& sums, void* stream);

// slope_i += coefficient_i centered_i; and rounds the potential to float
int launch_pair_sums(const Points& a, const PairSums& sums, float* potential /* [n] */, void* stream);

}  // namespace fastmargin
