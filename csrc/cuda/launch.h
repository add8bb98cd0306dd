// What the host code asks of the kernels: raw pointers, sizes, a stream. No torch header, so nvcc compiles them
// anywhere. Every launcher returns cudaSuccess (0) or the error of the launch.
#pragma once

#include <cstdint>

#include "../optimizer_step.h"
#include "../pairs.h"

namespace fastmargin {

enum class OperandType { kFloat, kBf16, kHalf };  // of the matrix products

// The classes of one wave: `n` of them from place `first`, read through `class_ids` where the caller selected some.
struct Classes {
  const float* w;            // [C, d] with strides
  int64_t row, column;       // strides of w, in elements
  const float* bias;         // [C], or null
  const int64_t* class_ids;  // [all] ids, or null
  int64_t all;               // classes, or selected ones
  int64_t d;                 //
  bool normalize;            //
  int64_t first, n;          // of this wave
};

// The products of all rows with the operands of one wave. The logit is z * factor_j + bias_j.
struct Logits {
  float* z;             // [B, n]
  int64_t B;            //
  const int64_t* y;     // [B] places; out of range: a class that is not here
  const float* factor;  // [n]
};

// The k best of every row so far, and its sum of exp(z) as shift + log(sum).
struct RowState {
  float* shift;         // [B]
  float* sum;           // [B]
  float* top_values;    // [B, k]
  int64_t* top_places;  // [B, k]
  int64_t k;
};

// d_target and d_topk, sorted by class.
struct Entries {
  const int64_t* place;  // [m]
  const int64_t* row;    // [m]
  const float* value;    // [m]
  int64_t m;
};

// x, and what a row's gradients are multiplied by.
struct Upstream {
  const float* x;             // [B, d]
  const float* rest;          // [B]
  const float* d_rest;        // [B]
  const float* d_target;      // [B]
  const float* d_topk;        // [B, k], or null
  const int64_t* top_places;  // [B, k]
  int64_t k;                  //
  const float* lift;          // [1] a power of two that g is multiplied by
};

// Class weights and the states of their optimiser, of which a rule may use fewer; all may change.
struct ClassStates {
  float* w;                  // [C, d]
  float *first, *second;     // [C, d] each, or null
  const int64_t* class_ids;  // [n] ids of the classes that change, or null: all
  const float* grad_scale;   // [] or null
  int64_t d;
};

// The operands of all classes, as they are kept from one pass to the next; an update writes those of its classes too.
struct Shadow {
  OperandType type;
  void* o;                // [C, d], or null: none are kept
  float *power, *factor;  // [C] each
  bool normalize;
};

// o_j = w_j * power_j, rounded, with power_j factor_j = 1 / ||w_j||; power is 1 for float operands, which may be null.
int launch_operands(OperandType type, const Classes& c, void* o /* [n, d] */, float* power /* [n] */,
                    float* factor /* [n] */, void* stream);

int launch_nontarget_lse_fwd(const Logits& z, const Classes& c, const RowState& s, void* stream);

// rest = shift + log(sum)
int launch_rest(const RowState& s, float* rest /* [B] */, int64_t B, void* stream);

// g_ij = lift d_rest_i exp(z_ij - rest_i) factor_j, 0 at the targets; float g may take the place of z
int launch_nontarget_lse_bwd(OperandType type, const Logits& z, const Classes& c, const Upstream& u,
                             void* g /* [B, n] */, void* stream);

// dw, given as sum_i g_ij x_i, becomes the gradient: entries added, lift taken out, projected. db likewise, if not
// null.
int launch_weight_gradient(const Classes& c, const Upstream& u, const Entries& e, const float* power /* [n] */,
                           const float* factor /* [n] */, float* dw /* [n, d] or null */, float* db /* [n] or null */,
                           void* stream);

// dx_i = the gradients of its target and its best times their unit weights
int launch_row_gradient(const Classes& c, const Upstream& u, const int64_t* y /* [B] */, int64_t B,
                        float* dx /* [B, d] */, void* stream);

// dx += sum over splits / lift
int launch_add_splits(const Upstream& u, const float* splits, int64_t count /* splits [count, n] */, int64_t n,
                      float* dx /* [n] */, void* stream);

int launch_class_update(const Sgd& rule, const ClassStates& s, const Shadow& kept, const float* g /* [n, d] */,
                        int64_t first, int64_t n, void* stream);
int launch_class_update(const AdamW& rule, const ClassStates& s, const Shadow& kept, const float* g /* [n, d] */,
                        int64_t first, int64_t n, void* stream);
int launch_class_lazy_update(const ClassStates& s, const float* products /* [n, 4] */, int64_t n, void* stream);

int launch_target_logit(const Classes& c, const float* x /* [B, d] */, const int64_t* y /* [B] */, int64_t B,
                        float* target /* [B] */, void* stream);

// One side of a wave of pairs of points.
struct Points {
  const float* given;    // [n, d]
  const int64_t* id;     // [n]
  const float* weight;   // [n], or null: 1
  const float* centred;  // [n, d] less the mean of all b
  const float* squares;  // [n] of the centred
  int64_t n, d;
};

// What is summed for the rows of a wave.
struct PairSums {
  double* potential;  // [n]
  double* pull;       // [n] of 2 phi'
  float* slope;       // [n, d], or null: not wanted
};

// centred_i = given_i - mean and its squares
int launch_centre(const float* given /* [n, d] */, const float* mean /* [d] */, int64_t n, int64_t d,
                  float* centred /* [n, d] */, float* squares /* [n] */, void* stream);

// The products of a and b become -2 phi'(u) weight_j, near pairs 0. Potentials and pulls are summed, and the slopes of
// near pairs.
int launch_pairwise_potential(const Inverse& phi, const Points& a, const Points& b, float* u /* [a.n, b.n] */,
                              const PairSums& sums, void* stream);
int launch_pairwise_potential(const Hinge& phi, const Points& a, const Points& b, float* u /* [a.n, b.n] */,
                              const PairSums& sums, void* stream);

// slope_i += pull_i a_i, and the potential as a float
int launch_pair_sums(const Points& a, const PairSums& sums, float* potential /* [n] */, void* stream);

}  // namespace fastmargin
