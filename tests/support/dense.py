"""The definition of nontarget_lse, dense and in plain autograd, and problems to try it on."""

import math

import torch
import torch.nn.functional as F

F32, F64 = torch.float32, torch.float64
NAN_BITS = (0x7FC00000, 0x7FC00001, 0x7F800001, 0x7FFFFFFF, -1)  # float32 NaNs, some with a payload


def dense(x, w, y, bias=None, class_ids=None, normalize_weight=True, topk=0):
    """The definition, in plain autograd."""
    w = w if class_ids is None else w[class_ids]
    w = F.normalize(w, eps=1e-12) if normalize_weight else w
    z = x @ w.T if bias is None else x @ w.T + (bias if class_ids is None else bias[class_ids])
    is_target = y[:, None] == torch.arange(len(w))
    rest = z.masked_fill(is_target, -torch.inf).logsumexp(1)
    target = torch.where(is_target, z, 0.0).sum(1)
    order = z.masked_fill(is_target, -torch.inf).sort(dim=1, descending=True, stable=True)
    return rest, target, order.values[:, :topk], order.indices[:, :topk]


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def run(op, x, w, y, bias, upstream, **options):
    """Outputs and gradients. `upstream` are the gradients of rest, target and topk_values."""
    x, w, bias = leaves(x, w, bias)
    out = op(x, w, y, bias=bias, **options)
    pairs = [(o, g) for o, g in zip(out[:3], upstream, strict=True) if o.numel() and o.requires_grad]
    torch.autograd.backward([o for o, _ in pairs], [g.to(o.dtype) for o, g in pairs])
    grads = [t.grad.to_dense() for t in (x, w, bias) if t is not None]
    return [*out[:3], *grads], out[3]


def problem(B, d, C, k=0, s=16.0, cosine=None, plain=False):
    """Rows of norm s in float64; with `cosine`, that near to their own class."""
    w = torch.randn(C, d, dtype=F64) * 0.1
    y = torch.randint(0, C, (B,))
    f = F.normalize(torch.randn(B, d, dtype=F64))
    if cosine is not None:
        center = F.normalize(w[y])
        across = F.normalize(f - (f * center).sum(1, keepdim=True) * center)
        f = cosine * center + math.sqrt(1 - cosine**2) * across
    bias = torch.randn(C, dtype=F64) if plain else None
    upstream = torch.rand(B, dtype=F64) + 0.1, -torch.rand(B, dtype=F64), 0.1 * torch.rand(B, k, dtype=F64)
    return s * f, w, y, bias, upstream


def seen(dtype, x, w, normalize_weight=True):
    """The operands that products of `dtype` see, in float64: x, and w as unit rows where weights are normalized."""
    if not normalize_weight:
        return x.to(dtype).double(), w.to(dtype).double()
    norm = w.double().norm(dim=1, keepdim=True)
    power = norm.log2().round().exp2()  # float16 has few exponents; a power of two changes no other bit
    return x.to(dtype).double(), (w.double() / power).to(dtype).double() * power / norm


def without_topk(upstream):
    """Which classes are the k best is settled by rounded logits: their gradients are left out of comparisons."""
    return *upstream[:2], torch.zeros_like(upstream[2])


def cast(dtype, *tensors):
    return [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
