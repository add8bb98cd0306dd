// A stand-in for CUDA's header: kernels compiled by a C++ compiler run on the CPU, one block after the other.
//
// The threads of a block are fibers of one OS thread. A fiber runs until it meets a barrier, of its block or of its
// warp. A warp runs as far ahead of the others as barriers let it, the first before the last in even blocks and the
// last before the first in odd ones: where a barrier between warps is missing, memory is read too early or overwritten
// too soon, every time. A barrier that only some threads reach throws. Races within a warp, and the order in which a
// GPU's memory shows writes, it cannot show.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after the other

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};
using cudaStream_t = void*;
enum : int { cudaSuccess = 0 };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};

inline dim3 threadIdx, blockIdx;

namespace emulated {

inline int64_t kernels = 0, products = 0;  // how many were launched

enum class State { kRuns, kAtBlock, kAtWarp, kDone };

constexpr unsigned kStack = 64 << 10;

struct Fiber {
  ucontext_t start;
  jmp_buf at;  // switching by jumps leaves the signal mask alone, which swapcontext asks the system about
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  bool started;
  long long word;  // what it hands to the other lanes of its warp
};

inline std::vector<Fiber> fibers;
inline unsigned threads;  // of the block
inline jmp_buf scheduler;
inline unsigned current;
inline std::function<void()> body;

inline void wait(State at) {
  Fiber& me = fibers[current];
  me.state = at;
  if (_setjmp(me.at) == 0) _longjmp(scheduler, 1);
}

inline void start() {
  body();
  fibers[current].state = State::kDone;
  _longjmp(scheduler, 1);
}

inline void go_on(Fiber& f) {
  if (_setjmp(scheduler) != 0) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.start);
}

// Opens a barrier at which all fibers from first to last wait; false if they do not.
inline bool open(State at, unsigned first, unsigned last) {
  for (unsigned i = first; i < last; ++i)
    if (fibers[i].state != at) return false;
  for (unsigned i = first; i < last; ++i) fibers[i].state = State::kRuns;
  return true;
}

inline void run_warp(unsigned first, unsigned last, bool forward) {
  do {
    for (unsigned i = 0; i < last - first; ++i) {
      current = threadIdx.x = forward ? first + i : last - 1 - i;
      if (fibers[current].state == State::kRuns) go_on(fibers[current]);
    }
  } while (open(State::kAtWarp, first, last));
}

inline void prepare(Fiber& f) {
  f.state = State::kRuns;
  f.started = false;
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get();
  f.start.uc_stack.ss_size = kStack;
  makecontext(&f.start, start, 0);
}

inline void run_block(unsigned of_block) {
  threads = of_block;
  const bool forward = blockIdx.x % 2 == 0;
  const unsigned warps = (threads + 31) / 32;
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  for (unsigned i = 0; i < threads; ++i) prepare(fibers[i]);
  do {
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned first = 32 * (forward ? w : warps - 1 - w);
      run_warp(first, first + 32 < threads ? first + 32 : threads, forward);
    }
  } while (open(State::kAtBlock, 0, threads));
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].state != State::kDone) throw std::runtime_error("a barrier that not all threads reach");
}

// Hands a word to all threads that wait at the same barrier, and what `read` makes of theirs to this one.
template <typename F>
auto exchange(State at, long long word, const F& read) {
  const unsigned me = current;
  fibers[me].word = word;
  wait(at);
  const auto result = read(me);
  wait(at);
  return result;
}

inline long long shuffled(long long word, int lane) {
  return exchange(State::kAtWarp, word, [&](unsigned me) { return fibers[me ^ unsigned(lane)].word; });
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::kAtBlock); }

inline int __syncthreads_or(int vote) {
  return emulated::exchange(emulated::State::kAtBlock, vote, [](unsigned) {
    int any = 0;
    for (unsigned i = 0; i < emulated::threads; ++i) any |= emulated::fibers[i].word != 0;
    return any;
  });
}

inline unsigned __ballot_sync(unsigned, int vote) {
  return emulated::exchange(emulated::State::kAtWarp, vote, [](unsigned me) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane)
      bits |= unsigned(emulated::fibers[me / 32 * 32 + lane].word != 0) << lane;
    return bits;
  });
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline long long __shfl_xor_sync(unsigned, long long v, int lane) { return emulated::shuffled(v, lane); }
inline float __shfl_xor_sync(unsigned, float v, int lane) {
  long long word = 0;
  __builtin_memcpy(&word, &v, 4);
  word = emulated::shuffled(word, lane);
  __builtin_memcpy(&v, &word, 4);
  return v;
}

template <typename... Params, typename... Args>
int cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  ++emulated::kernels;
  emulated::body = [&] { kernel(args...); };
  for (unsigned b = 0; b < config->gridDim.x; ++b) {
    blockIdx.x = b;
    emulated::run_block(config->blockDim.x);
  }
  return cudaSuccess;
}
