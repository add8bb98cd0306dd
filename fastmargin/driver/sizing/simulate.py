"""The shards of N ranks, computed one after another on one machine: do they equal one head, and what would they send?

Every rank scores all rows against its own classes. What it would send is merged by the functions that a group uses
(distributed/merge.py), the loss is computed from that, and its gradient goes back through every rank, which gives its
own dw and a part of dx; the parts are added in the order of the ranks. All of it is compared with a MarginHead that has
all classes, by ||difference|| / ||whole||. This checks the arithmetic for any number of ranks. Nothing is sent, so the
collectives (distributed/functions.py) are checked only by the tests with groups of processes. The last quarter of the
classes are copies of the first, so that the lists hold ties across shards. Letters: B rows of all ranks, b of each, C
classes, d features, N ranks, k mined classes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmargin.distributed.layout import Layout, chunk_sizes
from fastmargin.distributed.merge import merge_lists, merge_parts, pack_lists, shard_gradients
from fastmargin.driver.sizing.plan import Plan, wire
from fastmargin.head.margin_head import MarginHead
from fastmargin.margins.angular import ArcFace
from fastmargin.ops.nontarget_lse import nontarget_lse
from fastmargin.ops.problem import LSEOutput

LIMITS = {torch.float64: 1e-12, torch.float32: 3e-6}  # as in tests/distributed


class Result(NamedTuple):
    """Losses, mined lists and gradients of the batch of all ranks; the objective is the average of their losses."""

    loss: Tensor  # [B]
    scores: Tensor  # [B, k]
    classes: Tensor  # [B, k]
    df: Tensor  # [B, d]
    dw: Tensor  # [C, d]


def problem(p: Plan, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:  # [B, d], [C, d], [B]
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(p.classes, p.dim, generator=generator, dtype=torch.float64)
    copies = p.classes // 4
    w[p.classes - copies :] = w[:copies]
    y = torch.randint(p.classes, (p.rows,), generator=generator)
    f = torch.randn(p.rows, p.dim, generator=generator, dtype=torch.float64) + 0.5 * w[y]
    return f.to(dtype), w.to(dtype), y


def one_process(p: Plan, f: Tensor, w: Tensor, y: Tensor) -> Result:  # [B, d], [C, d], [B]
    head = MarginHead(p.dim, p.classes, ArcFace(), topk=p.topk, reduction="none").to(w.dtype)
    head.load_full_weight(w)
    f = f.clone().requires_grad_()
    out = head(f, y)
    out.loss.mean().backward()
    assert f.grad is not None and head.weight.grad is not None
    return Result(out.loss.detach(), out.hard_scores, out.hard_classes, f.grad, head.weight.grad)


def local(
    x: Tensor,  # [B, d]
    w: Tensor,  # [c, d]
    y: Tensor,  # [B]
    classes: Layout,
    k: int,
) -> LSEOutput:  # topk_classes are global ids
    """The outputs of one rank, over its own classes."""
    out = nontarget_lse(x, w, classes.local_index(y), topk=k)
    return out._replace(topk_classes=classes.global_id(out.topk_classes))


def ranks_in_turn(
    p: Plan,
    f: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
) -> tuple[Result, dict[str, float]]:  # with the bytes that the first rank would send, by collective
    N, margin = p.gpus, ArcFace()
    shards = [Layout(None, chunk_sizes(p.classes, N), rank) for rank in range(N)]
    f = f.clone().requires_grad_()
    norms = f.norm(dim=1)
    x = margin.s * f / norms[:, None]
    parts, lists = forward(shards, x.detach(), w, y, p.topk)
    rest, target = (t.requires_grad_() for t in merge_parts(parts))
    scores, mined = merge_lists(lists, p.topk, x.dtype)
    loss = -F.logsigmoid(margin.s * margin(target / margin.s, norms.detach(), y) - rest)
    d_rest, d_target = torch.autograd.grad((N / p.rows * loss).sum(), (rest, target))
    back = torch.stack((d_rest, d_target, rest.detach()), 1)
    dx, dw = backward(shards, x.detach(), w, y, parts[..., 0], back)
    x.backward(N * dx)
    assert f.grad is not None
    result = Result(loss.detach(), scores / margin.s, mined, f.grad / N, dw)
    return result, messages(p, x, y, parts, lists, back, dx, result)


def forward(
    shards: list[Layout],
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    k: int,
) -> tuple[Tensor, Tensor]:  # (rest, target) [N, B, 2], lists [N, B, 3 k]
    parts, lists = [], []
    for classes in shards:
        rest, target, values, found = local(x, classes.local_slice(w), y, classes, k)
        parts.append(torch.stack((rest, target), 1))
        lists.append(pack_lists(values, found))
    return torch.stack(parts), torch.stack(lists)


def backward(
    shards: list[Layout],
    x: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
    rests: Tensor,  # [N, B]
    back: Tensor,  # [B, 3] d_rest, d_target, rest over all classes
) -> tuple[Tensor, Tensor]:  # the sum of the ranks' dx [B, d], dw [C, d]
    dx, dw = torch.zeros_like(x), torch.empty_like(w)
    d_rest, d_target, merged = back.unbind(1)
    for classes, rest in zip(shards, rests, strict=True):
        leaf, own = x.clone().requires_grad_(), classes.local_slice(w).clone().requires_grad_()
        outputs = local(leaf, own, y, classes, 0)[:2]
        torch.autograd.backward(outputs, shard_gradients(rest, merged, d_rest, d_target, len(shards)))
        assert leaf.grad is not None and own.grad is not None
        dx += leaf.grad
        classes.local_slice(dw).copy_(own.grad)
    return dx, dw


def messages(
    p: Plan,
    x: Tensor,  # [B, d]
    y: Tensor,  # [B]
    parts: Tensor,  # [N, B, 2]
    lists: Tensor,  # [N, B, 3 k]
    back: Tensor,  # [B, 3]
    dx: Tensor,  # [B, d]
    result: Result,
) -> dict[str, float]:
    """Bytes that the first rank sends: its own rows to all others, or to each other rank the rows of that rank."""
    b = p.batch

    def to_all(*rows: Tensor) -> float:  # [B, ...] each
        return float((p.gpus - 1) * sum(t[:b].nbytes for t in rows))

    sent = {
        "labels, all-gather": to_all(y),
        "rows, all-gather": to_all(x),
        "parts, all-to-all": float(parts[0, b:].nbytes),
        "lists, all-to-all": float(lists[0, b:].nbytes),
        "gradients, all-gather": to_all(back),
        "dx, reduce-scatter": float(dx[b:].nbytes),
        "mined table, all-gather": to_all(y, result.classes, result.scores),
    }
    return {name: size for name, size in sent.items() if size}


def distance(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; infinite if infinities stand in different places, or for NaN."""
    if not torch.equal(got.isinf(), want.isinf()) or got.isnan().any():
        return torch.inf
    got, want = (t.double().nan_to_num(0, 0, 0) for t in (got, want))
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def misnamed(
    ranks: Result,
    whole: Result,
    f: Tensor,  # [B, d]
    w: Tensor,  # [C, d]
    y: Tensor,  # [B]
) -> tuple[int, int]:
    """The number of mined classes that differ, and of those among them that a tie does not explain.

    Copies of a class may have logits that differ in the last bit, since they lie elsewhere in a product. So a class may
    replace another in a list if it has the same score, is in the list once, and is not the row's own class.
    """
    apart = ranks.classes != whole.classes
    rows, named = apart.nonzero()[:, 0], ranks.classes[apart]
    cosines = (F.normalize(f[rows]) * F.normalize(w[named])).sum(1)
    once = (ranks.classes[rows] == named[:, None]).sum(1) == 1
    tie = (cosines - whole.scores[apart]).abs() <= LIMITS[w.dtype]
    return len(named), int((~(tie & once) | (named == y[rows])).sum())


def compare(p: Plan, dtype: torch.dtype) -> tuple[dict[str, float], int, dict[str, float]]:
    """Distances of the ranks' results from those of one process, the number of ties in another order, the bytes sent.

    RuntimeError if a distance is above its limit, or if a mined class differs without a tie.
    """
    given = problem(p, dtype)
    whole = one_process(p, *given)
    ranks, sent = ranks_in_turn(p, *given)
    distances = {name: distance(getattr(ranks, name), getattr(whole, name)) for name in ("loss", "scores", "df", "dw")}
    wrong = {name: far for name, far in distances.items() if not far <= LIMITS[dtype]}
    if wrong:
        raise RuntimeError(f"{p.gpus} ranks and one process are {wrong} apart in {dtype}, above {LIMITS[dtype]}")
    apart, others = misnamed(ranks, whole, *given)
    if others:
        raise RuntimeError(f"{others} mined classes of {p.gpus} ranks in {dtype} are not those of one process")
    return distances, apart, sent


def report(p: Plan, log: Callable[[str], None]) -> None:
    """Compares in float64 and float32, and the size of the float32 messages with the formula of `plan`.

    RuntimeError as in `compare`, and if a message has another size.
    """
    log(
        f"{p.gpus:,} ranks with {p.held:,} of {p.classes:,} classes each at most, {p.batch:,} rows each, d = {p.dim}, "
        f"k = {p.topk}; distances from one process:"
    )
    for dtype in LIMITS:
        distances, ties, sent = compare(p, dtype)
        listed = ", ".join(f"{name} {far:.1e}" for name, far in distances.items())
        but = f" except for {ties} ties" if ties else ""
        log(f"  {str(dtype).removeprefix('torch.')}: {listed}; the mined classes are the same{but}")
    if sent != wire(p):
        raise RuntimeError(f"messages of {sent} bytes: plan counts {wire(p)}")
    log("bytes that a rank sends in a step (float32), counted from its tensors; plan's formulas give the same:")
    for name, size in sent.items():
        log(f"  {name:28}{size:>16,.0f}")
