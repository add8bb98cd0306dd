"""The floors: the matrix products of a pass, and nothing else.

    1 product     z = f w^T [B, C]                               a forward pass
    3 products    z,  dx = z w,  dw = z^T f                      a step that keeps z
    4 products    z,  dx = z w,  z once more,  dw = z^T f        a step that recomputes z

Whole products write z and read it back; oneDNN computes a b^T of two row-major operands and is given each of them in
that layout, so that no transposed copy is made in the time measured. "In cache" is blocks.cpp, where z never leaves
the cache: the floor of kernels like ours. In bfloat16 the operands are cast beforehand; torch.mm then rounds what it
writes, z included.
"""

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from contestants.arcface import Prepare
from torch import Tensor
from torch.utils import cpp_extension

COMPILER = shutil.which("c++") or shutil.which("g++")
BUILT = Path(__file__).parents[2] / ".benchmarks" / f"blocks-{torch.__version__}.so"

Products = Callable[[], object]


def mm_1(f: Tensor, w: Tensor) -> Products:  # [B, d], [C, d]
    return lambda: torch.mm(f, w.T)


def mm_3(f: Tensor, w: Tensor) -> Products:  # [B, d], [C, d]
    def products() -> tuple[Tensor, Tensor]:  # dx [B, d], dw [C, d]
        z = torch.mm(f, w.T)
        return torch.mm(z, w), torch.mm(z.T, f)

    return products


def mm_4(f: Tensor, w: Tensor) -> Products:  # [B, d], [C, d]
    return lambda: (torch.mm(torch.mm(f, w.T), w), torch.mm(torch.mm(f, w.T).T, f))


def one_dnn(a: Tensor, b: Tensor) -> Tensor:  # [m, k], [n, k] -> [m, n]
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def one_dnn_1(f: Tensor, w: Tensor) -> Products:  # [B, d], [C, d]
    return lambda: one_dnn(f, w)


def one_dnn_3(f: Tensor, w: Tensor) -> Products:  # [B, d], [C, d]
    ft, wt, zt = f.T.contiguous(), w.T.contiguous(), one_dnn(w, f)
    return lambda: (one_dnn(one_dnn(f, w), wt), one_dnn(zt, ft))


def one_dnn_4(f: Tensor, w: Tensor) -> Products:  # [B, d], [C, d]
    ft, wt = f.T.contiguous(), w.T.contiguous()
    return lambda: (one_dnn(one_dnn(f, w), wt), one_dnn(one_dnn(w, f), ft))


@functools.cache
def blocks() -> Callable[..., None]:
    """blocks.cpp, compiled once."""
    source = Path(__file__).with_name("blocks.cpp")
    if not BUILT.exists() or BUILT.stat().st_mtime < source.stat().st_mtime:
        BUILT.parent.mkdir(exist_ok=True)
        include = [f"-I{path}" for path in cpp_extension.include_paths()]
        link = [f"-L{path}" for path in cpp_extension.library_paths()]
        flags = ["-O2", "-std=c++20", "-fPIC", "-shared", "-fopenmp", *include, *link]
        command = [COMPILER, *flags, str(source), "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(BUILT)]
        subprocess.run(command, check=True)
    torch.ops.load_library(BUILT)
    return torch.ops.fastmargin_bench.products


def in_cache(count: int) -> Callable[[Tensor, Tensor], Products]:
    def prepare(f: Tensor, w: Tensor) -> Products:  # [B, d], [C, d]
        dw, run = torch.zeros(w.shape if count > 1 else (0,)), blocks()
        return lambda: run(f, w, dw, count)

    return prepare


def floor(products: Callable[[Tensor, Tensor], Products], dtype: torch.dtype = torch.float32) -> Prepare:
    return lambda f, w, y: products(f.detach().to(dtype), w.detach().to(dtype))


FORWARD: dict[str, Prepare] = {
    "1 product, torch.mm": floor(mm_1),
    "1 product, oneDNN": floor(one_dnn_1),
    "1 product, in cache": floor(in_cache(1)),
    "1 product, in cache, bfloat16": floor(in_cache(1), torch.bfloat16),
    "1 product, torch.mm of bfloat16": floor(mm_1, torch.bfloat16),
}
FORWARD_BACKWARD: dict[str, Prepare] = {
    "3 products, torch.mm": floor(mm_3),
    "3 products, oneDNN": floor(one_dnn_3),
    "3 products, in cache": floor(in_cache(3)),
    "4 products, in cache": floor(in_cache(4)),
    "4 products, in cache, bfloat16": floor(in_cache(4), torch.bfloat16),
    "4 products, torch.mm": floor(mm_4),
    "4 products, oneDNN": floor(one_dnn_4),
    "4 products, torch.mm of bfloat16": floor(mm_4, torch.bfloat16),
}
