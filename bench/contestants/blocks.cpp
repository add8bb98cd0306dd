// The matrix products of a step on blocks that stay in cache, by oneDNN's brgemm, and nothing else: a floor for CPU
// kernels that work block by block. The values do not matter: nothing is transposed or rounded, and the threads' dx are
// not summed.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

namespace {

constexpr int64_t kBlock = 256, kRowTile = 256;

// For every block of classes and tile of rows: z = w x^T;  dx += e w;  z once more;  dw = g x. With `count` 1 only the
// first, with 3 all but the third. T is the type of the operands; a buffer of ones stands for e and g.
template <typename T>
void products(const at::Tensor& x /* [B, d] */, const at::Tensor& w /* [C, d] */, float* dw /* [C, d] */,
              int64_t count) {
  using at::native::cpublas::brgemm;
  const int64_t B = x.size(0), d = x.size(1), C = w.size(0), blocks = (C + kBlock - 1) / kBlock;
  at::parallel_for(0, blocks, at::divup(blocks, at::get_num_threads()), [&](int64_t begin, int64_t end) {
    std::vector<float> z(kBlock * kRowTile), dx(B * d);
    std::vector<T> e(kBlock * kRowTile, T(1));
    for (int64_t block = begin; block < end; ++block)
      for (int64_t i = 0; i < B; i += kRowTile) {
        const int64_t n = std::min(kBlock, C - block * kBlock), m = std::min(kRowTile, B - i);
        const T *ws = w.const_data_ptr<T>() + block * kBlock * d, *xs = x.const_data_ptr<T>() + i * d;
        for (int64_t again = 0; again < (count == 4 ? 2 : 1); ++again)
          brgemm(n, m, d, d, m, m, false, ws, xs, z.data());
        if (count == 1) continue;
        brgemm(m, d, n, n, d, d, true, e.data(), ws, dx.data() + i * d);
        brgemm(n, d, m, m, d, d, i > 0, e.data(), xs, dw + block * kBlock * d);
      }
    at::native::cpublas::brgemm_release();
  });
}

void step(const at::Tensor& x, const at::Tensor& w, const at::Tensor& dw, int64_t count) {
  if (x.scalar_type() == at::kFloat) return products<float>(x, w, dw.data_ptr<float>(), count);
  products<at::BFloat16>(x, w, dw.data_ptr<float>(), count);
}

}  // namespace

TORCH_LIBRARY(fastmargin_bench, m) { m.def("products", step); }
