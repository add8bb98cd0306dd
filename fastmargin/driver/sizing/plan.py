"""How large a head can be: memory, communication and step time of a rank, estimated before machines are rented.

Letters: C classes, d features, N ranks, b rows a rank and B = N b, c = ceil(C / N) classes of a rank, r the sampling
rate, n classes of a rank in a step, k mined classes, e bytes of a product's operand (2 or 4), m moments that the
optimizer keeps (SGD 1, AdamW 2), w classes of a chunk: a rank works on ceil(n / w) class chunks, one after another.

    n = c, or with sampled classes min(c, r c + b): those drawn, and this rank's share of the batch's own
    w = 2^23 / max(B, d), at least 256, at most 2^14, then doubled up to four times until the GPU has work for the 44 us
        that the host takes to launch a chunk (nontarget_lse_chunks.h);  256 on the CPU, in tiles of 256 rows
    s = partial sums of dx: the largest of 8, 4, 2 with s ceil(B / 128) ceil(d / 256) <= 132 (ibid.), else 1;  3 on the
        CPU: one for each of two threads, and the total

Memory of a rank, bytes (the weight and all sums are float32):

    weight      4 d c
    moments     4 d c m                      optim: momentum, or both moments
    gradient    4 d n                        0 with the step in backward, whose dw is that of a class chunk
    rows        32 d b + d B (8 + e + 4 s)   own rows, eight arrays from features to x and back; gathered x, its
                                             operand, dx, and the partial sums of dx
    class chunk w (B (4 + e) + d (4 + e))    z and E, weights as operands, dw
    exponentials e B n                       where they fit keep_bytes, kept from forward to backward; GPUs, not fp16
    lists       B (64 + 36 k)                labels, parts and gradients; top-k: local, packed, received
    draw        5 c + 36 n + 24 min(c, 2^20) sampled classes: marks and last steps; indices, lazy updates; hashes
    backbone    as given

and in the memory of the host, for every rank, the mined table of 12 k C bytes (mining.py).

Communication: bytes a row that a rank sends, and receives, in a step (fastmargin/distributed), for B (N - 1) / N rows:

    labels 8    rows 4 d    parts (rest, target) 8    lists 12 k    gradients back 12    dx 4 d    mined table 8 + 12 k

Margins with statistics of the whole batch would add 8, mined classes that are sampled 8 k.

Time: of each phase the larger of FLOPs / rate and bytes / bandwidth, then the communication; no phase overlaps another.
Each product is 2 B n d FLOPs. This is a lower bound: exponentials, norms, launches and latency are not counted.

    draw            160 c bytes                          sampled classes: ten passes of eight bytes, read and written
    lazy updates    16 d n bytes                         sampled classes with momentum: late rows, read and written
    forward z       product, 4 d n bytes                 the weights
    backward z      product, 4 d n bytes                 the same again; not where exponentials are kept
    dx              product
    exponentials    2 e B n bytes                        where kept: written, and read for dw
    dw and update   product, 4 d n + 8 d n m bytes       in backward; else 16 d n + 8 d n m: dw written and read

A class chunk has w (B (4 + e) + d (8 + e)) bytes of z, E, weights, their operands and dw (on the CPU, of the 256 rows
of a tile). If the cache does not hold them, all that is no weight goes through the memory, too, once a product: x (e d
B a chunk), the partial sums of dx (8 s d B a chunk), z (8 B n: written and read) and E (e B n).

PartialFC at the same settings, by a formula for its published memory (speed_benchmark.md of InsightFace's
arcface_torch, its first version, 41.95 and 7.98 kB a class at B = 1,024, d = 512, rate 1 and 0.1): the weight and its
moments, and of the n classes of a step the gradient, four more arrays of their width (normalized copy, backward of the
normalization) and seven of logits' size (cosines, clamped, with margin, softmax, gradients): 4 d c (1 + m) + n (20 d +
28 B). Its second version keeps a gradient of all c classes besides; rows and communication are not counted for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from fastmargin.require import require

GB, MOST_GPUS = 1e9, 2**16
EFFICIENCY = 0.8  # share of a GPU's nominal rates: an assumption (Hopper's products reach it, Liger-Kernel#1422)
SPARE = 0.1  # share of the memory that is kept free: for the driver, NCCL's buffers, fragmentation

Optimizer = Literal["sgd", "adamw"]
ComputeDtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Device:
    """What a rank runs on: bytes, and FLOPs and bytes per second."""

    title: str
    memory: float
    cache: float  # the last level
    products: dict[str, float]  # rate by type of the operands, the preferred 16-bit one first
    bandwidth: float
    node: int  # ranks that the faster link connects
    link: float  # within a node, one way
    network: float  # between nodes, of a rank
    draw: float  # classes per second, of sampling
    tile: float = math.inf  # rows of a product at a time


def gpu(
    title: str, memory: int, cache: int, half: float, single: float, bandwidth: float, link: float, network: float
) -> Device:
    """From MiB, and nominal figures in MB, dense TFLOP/s of 16-bit and of float32 products, GB/s."""
    names = ("fp16",) if "V100" in title else ("bf16", "fp16")
    products = dict.fromkeys(names, EFFICIENCY * half * 1e12) | {"fp32": EFFICIENCY * single * 1e12}
    memory_rate, link_rate, network_rate = (EFFICIENCY * rate * 1e9 for rate in (bandwidth, link, network))
    return Device(
        title, memory * 2**20, cache * 1e6, products, memory_rate, 8, link_rate, network_rate, memory_rate / 160
    )


# Nominal figures of NVIDIA's data sheets: SXM boards, NVLink one way, and the network adapters of DGX H200, H100 (a 400
# Gb/s one a GPU), A100 (200) and DGX-1 (four of 100 Gb/s for eight GPUs). None of them was measured by this project.
# Memory is what nvidia-smi shows of boards that the sheets call 141, 80, 80 and 32 GB, which are GiB, or nearly.
DEVICES = {
    "h200": gpu("NVIDIA H200", 143_771, 50, 989, 67, 4800, 450, 50),
    "h100": gpu("NVIDIA H100", 81_559, 50, 989, 67, 3350, 450, 50),
    "a100": gpu("NVIDIA A100", 81_920, 40, 312, 19.5, 2039, 300, 25),
    "v100": gpu("NVIDIA V100", 32_510, 6, 125, 15.7, 900, 150, 6.25),
    # Measured (bench/NOTES.md), but for the network, a nominal 10 Gb/s: two cores of an AMD EPYC with AVX-512.
    "cpu": Device("two CPU cores", 24 * GB, 32e6, {"bf16": 1032e9, "fp32": 507e9}, 50e9, 1, 1.25e9, 1.25e9, 2e7, 256),
}


class Phase(NamedTuple):
    """FLOPs and bytes of a part of a step, and its seconds: those of the slower of the two, which `bound` names."""

    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """The settings of a head on `gpus` ranks. The functions below give its sizes in bytes and times in seconds.

    ValueError for a setting out of range.
    """

    classes: int
    dim: int
    batch: int  # rows of a rank
    gpus: int
    sample_rate: float = 1.0
    device: str = "h200"
    optimizer: Optimizer = "sgd"
    in_backward: bool = True
    compute_dtype: ComputeDtype | None = None  # None: the device's 16-bit type
    topk: int = 1
    keep_bytes: int = 0
    backbone_gb: float = 0.0

    def __post_init__(self) -> None:
        for name in ("classes", "dim", "batch", "gpus"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(0 < self.sample_rate <= 1, "sample_rate", self.sample_rate, "above 0, at most 1")
        require(self.topk >= 0, "topk", self.topk, "0 or more")
        require(self.keep_bytes >= 0, "keep_bytes", self.keep_bytes, "0 or more")
        require(0 <= self.backbone_gb < math.inf, "backbone_gb", self.backbone_gb, "0 or more, in GB")
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        types = [*self.on.products]
        require(
            self.compute_dtype in (None, *types),
            "compute_dtype",
            self.compute_dtype,
            f"one of {', '.join(types)} on {self.on.title}",
        )

    @property
    def on(self) -> Device:
        return DEVICES[self.device]

    @property
    def operands(self) -> str:
        """Their type."""
        return self.compute_dtype or next(iter(self.on.products))

    @property
    def e(self) -> int:
        """Bytes of an operand."""
        return 4 if self.operands == "fp32" else 2

    @property
    def moments(self) -> int:
        return 2 if self.optimizer == "adamw" else 1

    @property
    def rows(self) -> int:
        return self.gpus * self.batch

    @property
    def held(self) -> int:
        """c: classes of a rank."""
        return -(-self.classes // self.gpus)

    @property
    def used(self) -> float:
        """n: classes of a rank in a step."""
        return self.held if self.sample_rate == 1 else min(self.held, self.sample_rate * self.held + self.batch)

    @property
    def kept(self) -> float:
        """Bytes of the exponentials that a step keeps; 0: it makes them again."""
        size = self.e * self.rows * self.used
        able = self.on.tile == math.inf and self.operands != "fp16"
        return size if able and size <= self.keep_bytes else 0

    @property
    def class_chunk(self) -> int:
        """w: classes of a chunk."""
        if self.on.tile < math.inf:
            return min(self.held, 256)
        B, d = self.rows, self.dim
        w = max(256, min(2**23 // max(B, d) // 64 * 64, 2**14))
        for _ in range(4):
            w = 2 * w if w * (6 * B * d / 7e14 + 14 * d / 4e12 + 4 * B / 9e12) < 44e-6 else w
        return min(self.held, w)

    @property
    def sums(self) -> int:
        """s: partial sums of dx."""
        if self.on.tile < math.inf:
            return 3
        tiles = -(-self.rows // 128) * -(-self.dim // 256)
        return next(s for s in (8, 4, 2, 1) if s * tiles <= 132 or s == 1)


def memory(p: Plan) -> dict[str, float]:
    """Bytes of a rank by purpose; their sum has to fit."""
    B, d, c, n, e, w = p.rows, p.dim, p.held, p.used, p.e, p.class_chunk
    tile = min(B, p.on.tile)
    sizes = {
        "weight": 4 * d * c,
        "moments" if p.moments > 1 else "momentum": 4 * d * c * p.moments,
        "gradient": 0 if p.in_backward else 4 * d * n,
        "rows": 32 * d * p.batch + d * B * (8 + e + 4 * p.sums),
        "class chunk": w * (tile + d) * (4 + e),
        "exponentials": p.kept,
        "labels, parts, lists": B * (64 + 36 * p.topk),
        "draw": 0 if p.sample_rate == 1 else 5 * c + 36 * n + 24 * min(c, 2**20),
        "backbone": p.backbone_gb * GB,
    }
    return {name: float(size) for name, size in sizes.items() if size}


def table_bytes(p: Plan) -> float:
    """Bytes of the mined table, in the memory of the host, for every rank."""
    return 12.0 * p.topk * p.classes


def wire(p: Plan) -> dict[str, float]:
    """Bytes that a rank sends in a step, by collective; it receives as many."""
    a_row = {
        "labels, all-gather": 8,
        "rows, all-gather": 4 * p.dim,
        "parts, all-to-all": 8,
        "lists, all-to-all": 12 * p.topk,
        "gradients, all-gather": 12,
        "dx, reduce-scatter": 4 * p.dim,
        "mined table, all-gather": 8 + 12 * p.topk if p.topk else 0,
    }
    others = p.batch * (p.gpus - 1)
    return {name: float(size * others) for name, size in a_row.items() if size * others}


def phases(p: Plan) -> dict[str, Phase]:
    """The parts of a step, one after another."""
    B, d, c, n, e, w = p.rows, p.dim, p.held, p.used, p.e, p.class_chunk
    m, chunks = p.moments, -(-n // w)
    tile = min(B, p.on.tile)
    product = 2.0 * B * n * d

    def spilled(size: float) -> float:  # from a cache that does not hold a class chunk
        return size if w * (tile * (4 + e) + d * (8 + e)) > p.on.cache else 0.0

    def phase(flops: float, size: float) -> Phase:
        products, moved = flops / p.on.products[p.operands], size / p.on.bandwidth
        return Phase(flops, size, max(products, moved), "products" if products > moved else "memory")

    logits = 4 * d * n + spilled(chunks * e * d * B + 8 * B * n)
    written = (4 if p.in_backward else 16) * d * n + 8 * d * n * m
    out = {}
    if p.sample_rate < 1:
        out["draw"] = Phase(0, 160.0 * c, c / p.on.draw, "memory" if p.on.tile == math.inf else "draw")
        if p.optimizer == "sgd":
            out["lazy updates"] = phase(0, 16 * d * n)
    out["forward z"] = phase(product, logits)
    if not p.kept:
        out["backward z"] = phase(product, logits)
    out["dx"] = phase(product, spilled(chunks * 8 * p.sums * d * B + e * B * n))
    if p.kept:
        out["exponentials"] = phase(0, 2 * p.kept)
    out["dw and update"] = phase(product, written + spilled(chunks * e * d * B + e * B * n))
    if p.gpus > 1:
        near = p.gpus <= p.on.node
        size = sum(wire(p).values())
        out["wire"] = Phase(
            0, size, size / (p.on.link if near else p.on.network), "link within the node" if near else "network"
        )
    return out


def seconds(p: Plan) -> float:
    return sum(phase.seconds for phase in phases(p).values())


def bound(p: Plan) -> str:
    """What limits the step for most of its time."""
    spent: dict[str, float] = {}
    for phase in phases(p).values():
        spent[phase.bound] = spent.get(phase.bound, 0.0) + phase.seconds
    return max(spent, key=lambda name: spent[name])


def partial_fc(p: Plan) -> dict[str, float]:
    """Bytes of a rank under PartialFC, by purpose."""
    d, c, n = p.dim, p.held, p.used
    return {
        "weight and state": 4.0 * d * c * (1 + p.moments),
        "gradient and copies of the weight": 20.0 * d * n,
        "logits": 28.0 * p.rows * n,
        "backbone": p.backbone_gb * GB,
    }


def fits(device: Device, sizes: dict[str, float]) -> bool:
    return sum(sizes.values()) <= (1 - SPARE) * device.memory


def smallest(p: Plan, sizes: Callable[[Plan], dict[str, float]] = memory) -> int | None:
    """The fewest GPUs, in whole nodes beyond the first, whose memory suffices; None if no number up to 65,536 does.

    Each rank holds the rows of all ranks, so more of them do not always need less memory: every number is tried.
    """
    node = p.on.node
    for gpus in (*range(1, node), *range(node, MOST_GPUS + 1, node)):
        fewer = replace(p, gpus=gpus)
        if fits(p.on, sizes(fewer)):
            return gpus
    return None
