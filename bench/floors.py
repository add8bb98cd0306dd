"""The floors: the matrix products of a pass, and nothing else.

    1 product     z = f w^T [B, C]                               a forward pass
    3 products    z,  dx = z w,  dw = z^T f                      a step that keeps z
    4 products    z,  dx = z w,  z once more,  dw = z^T f        a step that recomputes z

oneDNN computes a b^T of two row-major operands and is given each of them in that layout: no floor holds a transposed
copy. On AMD it is about 1.7 times as fast as torch.mm, so it is the fairer floor there. In bfloat16 the operands are
cast beforehand and torch.mm rounds what it writes, z included.
"""

from collections.abc import Callable

import torch
from arcface import Prepare
from torch import Tensor

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


def floor(products: Callable[[Tensor, Tensor], Products], dtype: torch.dtype = torch.float32) -> Prepare:
    return lambda f, w, y: products(f.detach().to(dtype), w.detach().to(dtype))


FORWARD: dict[str, Prepare] = {
    "1 product, torch.mm": floor(mm_1),
    "1 product, oneDNN": floor(one_dnn_1),
    "1 product, torch.mm of bfloat16": floor(mm_1, torch.bfloat16),
}
FORWARD_BACKWARD: dict[str, Prepare] = {
    "3 products, torch.mm": floor(mm_3),
    "3 products, oneDNN": floor(one_dnn_3),
    "4 products, torch.mm": floor(mm_4),
    "4 products, oneDNN": floor(one_dnn_4),
    "4 products, torch.mm of bfloat16": floor(mm_4, torch.bfloat16),
}
