"""How large a head may be: memory of a rank, bytes on the wire and time of a step, counted before anything is rented.

Letters: C classes, d features, N ranks, b rows a rank and B = N b, c = ceil(C / N) classes of a rank, r the sampling
rate, n classes of a rank in a step, k mined classes, e bytes of a product's operand (2 or 4), m = 1 moment of SGD's, 2
of AdamW's. A wave has w classes; a rank makes ceil(n / w) of them.

    n = c, or min(c, r c + b) of sampled classes: what is drawn and this rank's share of the batch's own
    w = 2^23 / max(B, d), at least 256, at most 2^14 (nontarget_lse_glue.cpp);  256 on the CPU, in tiles of 256 rows
    s = sums of dx: 1, 2, 4 or 8, as long as s ceil(B / 128) ceil(d / 256) <= 132 (ibid.);  3 on the CPU, of two threads
        and in all

Memory of a rank, bytes (the weight and all sums are float32):

    weight      4 d c
    moments     4 d c m                      optim.py: momentum, or both moments
    gradient    0 in backward, else 4 d n    of a wave in backward
    rows        32 d b + d B (8 + e + 4 s)   own rows on their way to x and back, eight arrays; gathered x, its operand,
                                             dx, and its sums
    wave        w (B (4 + e) + d (4 + e))    z and g, weights as operands, dw
    lists       B (64 + 36 k)                labels, parts and gradients; top-k here, packed, received
    draw        5 c + 36 n + 24 min(c, 2^20) sampled classes: marks and last steps; places, products; hashes
    backbone    as given

and in the memory of the host, for every rank, the mined table of 12 k C bytes (mining.py).

Wire, bytes that a rank sends, and receives, in a step (distributed.py), each times (N - 1) / N, of B rows:

    labels 8    rows 4 d    parts 8    lists 12 k    gradients back 12    dx 4 d    mined table 8 + 12 k

Margins that look at the whole batch (8) and mined classes that are sampled (8 k) would add to them.

Time: the larger of FLOPs / rate and bytes / bandwidth in every phase, then the wire; no phase overlaps another. Each
product is 2 B n d FLOPs. A step takes that at least: exponentials, norms, launches and latency are not counted.

    draw            160 c bytes                          sampled classes: ten passes of eight bytes, in and out
    catch up        16 d n bytes                         sampled classes with momentum: late rows, read and written
    forward z       product, 4 d n bytes                 the weights
    backward z      product, 4 d n bytes                 once more
    dx              product
    dw and update   product, 4 d n + 8 d n m bytes       in backward; else 16 d n + 8 d n m: dw written and read

Where the cache does not hold a wave, w (B (4 + e) + d (8 + e)) of z, g, weights, their operands and dw (on the CPU of a
tile's 256 rows), what is no weight crosses the memory too, once a product: x (e d B a wave), the sums of dx (8 s d B a
wave), z (8 B n: written and read) and g (e B n).

PartialFC at the same settings, as its published memory is made up (speed_benchmark.md of InsightFace's arcface_torch,
its first version, 41.95 and 7.98 kB a class at B = 1,024, d = 512, rate 1 and 0.1): the weight and its moments, and of
the n classes of a step the gradient, four more arrays of their width (normalized copy, backward of the normalization)
and seven of logits' size (cosines, clamped, with margin, softmax, gradients): 4 d c (1 + m) + n (20 d + 28 B). Its
second version keeps a gradient of all c classes besides; rows and exchanges are not counted for it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from fastmargin.require import require

GB, MOST_GPUS = 1e9, 2**16
EFFICIENCY = 0.8  # of nominal rates, for GPUs: an assumption (Hopper's products reach it, Liger-Kernel#1422)
SPARE = 0.1  # of the memory, kept free: the driver, NCCL's buffers, fragments

Optimizer = Literal["sgd", "adamw"]
ComputeDtype = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Device:
    """What a rank runs on: bytes, and FLOPs and bytes per second."""

    title: str
    memory: float
    cache: float  # the last level
    products: dict[str, float]  # rate by type of the operands, the 16-bit one first
    bandwidth: float
    node: int  # ranks that the faster link joins
    link: float  # within a node, one way
    network: float  # between nodes, of a rank
    draw: float  # classes per second
    tile: float = math.inf  # rows that a product works on at a time


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
    "cpu": Device(
        "two CPU cores", 24 * GB, 32e6, {"bf16": 1032e9, "fp32": 507e9}, 50e9, 1, 1.25e9, 1.25e9, 2e7, 256
    ),
}


class Phase(NamedTuple):
    """FLOPs and bytes of a part of a step, and their seconds, which are those of the slower."""

    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclass(frozen=True)
class Plan:
    """A head over `gpus` ranks; everything else follows. Sizes in bytes, times in seconds.

    ValueError for what is out of range.
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
    backbone_gb: float = 0.0

    def __post_init__(self) -> None:
        for name in ("classes", "dim", "batch", "gpus"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(0 < self.sample_rate <= 1, "sample_rate", self.sample_rate, "above 0, at most 1")
        require(self.topk >= 0, "topk", self.topk, "0 or more")
        require(0 <= self.backbone_gb < math.inf, "backbone_gb", self.backbone_gb, "0 or more, in GB")
        require(self.device in DEVICES, "device", self.device, f"one of {', '.join(DEVICES)}")
        types = [*self.on.products]
        require(
            self.compute_dtype in (None, *types), "compute_dtype", self.compute_dtype,
            f"one of {', '.join(types)} on {self.on.title}",
        )  # fmt: skip

    @property
    def on(self) -> Device:
        return DEVICES[self.device]

    @property
    def operands(self) -> str:  # the type of
        return self.compute_dtype or next(iter(self.on.products))

    @property
    def e(self) -> int:
        return 4 if self.operands == "fp32" else 2

    @property
    def moments(self) -> int:
        return 2 if self.optimizer == "adamw" else 1

    @property
    def rows(self) -> int:
        return self.gpus * self.batch

    @property
    def held(self) -> int:
        return -(-self.classes // self.gpus)

    @property
    def used(self) -> float:
        return self.held if self.sample_rate == 1 else min(self.held, self.sample_rate * self.held + self.batch)

    @property
    def wave(self) -> int:
        if self.on.tile < math.inf:
            return min(self.held, 256)
        return min(self.held, max(256, min(2**23 // max(self.rows, self.dim) // 64 * 64, 2**14)))

    @property
    def sums(self) -> int:
        if self.on.tile < math.inf:
            return 3
        tiles = -(-self.rows // 128) * -(-self.dim // 256)
        return next(s for s in (8, 4, 2, 1) if s * tiles <= 132 or s == 1)


def memory(p: Plan) -> dict[str, float]:
    """Bytes of a rank by what they are for; their sum has to fit."""
    B, d, c, n, e, w = p.rows, p.dim, p.held, p.used, p.e, p.wave
    tile = min(B, p.on.tile)
    sizes = {
        "weight": 4 * d * c,
        "moments" if p.moments > 1 else "momentum": 4 * d * c * p.moments,
        "gradient": 0 if p.in_backward else 4 * d * n,
        "rows": 32 * d * p.batch + d * B * (8 + e + 4 * p.sums),
        "wave": w * (tile + d) * (4 + e),
        "labels, parts, lists": B * (64 + 36 * p.topk),
        "draw": 0 if p.sample_rate == 1 else 5 * c + 36 * n + 24 * min(c, 2**20),
        "backbone": p.backbone_gb * GB,
    }
    return {name: float(size) for name, size in sizes.items() if size}


def table_bytes(p: Plan) -> float:
    """Of the mined table, in the host's memory, for every rank."""
    return 12.0 * p.topk * p.classes


def wire(p: Plan) -> dict[str, float]:
    """Bytes that a rank sends in a step, and receives, by collective."""
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
    """What a step does, one after the other."""
    B, d, c, n, e, w = p.rows, p.dim, p.held, p.used, p.e, p.wave
    m, waves = p.moments, -(-n // w)
    tile = min(B, p.on.tile)
    product = 2.0 * B * n * d

    def spilt(size: float) -> float:  # by a cache that does not hold a wave
        return size if w * (tile * (4 + e) + d * (8 + e)) > p.on.cache else 0.0

    def phase(flops: float, size: float) -> Phase:
        products, moved = flops / p.on.products[p.operands], size / p.on.bandwidth
        return Phase(flops, size, max(products, moved), "products" if products > moved else "memory")

    logits = 4 * d * n + spilt(waves * e * d * B + 8 * B * n)
    written = (4 if p.in_backward else 16) * d * n + 8 * d * n * m
    out = {}
    if p.sample_rate < 1:
        out["draw"] = Phase(0, 160.0 * c, c / p.on.draw, "memory" if p.on.tile == math.inf else "draw")
        if p.optimizer == "sgd":
            out["catch up"] = phase(0, 16 * d * n)
    out["forward z"] = phase(product, logits)
    out["backward z"] = phase(product, logits)
    out["dx"] = phase(product, spilt(waves * 8 * p.sums * d * B + e * B * n))
    out["dw and update"] = phase(product, written + spilt(waves * e * d * B + e * B * n))
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
    """What most of a step's time goes to."""
    spent: dict[str, float] = {}
    for phase in phases(p).values():
        spent[phase.bound] = spent.get(phase.bound, 0.0) + phase.seconds
    return max(spent, key=lambda name: spent[name])


def partial_fc(p: Plan) -> dict[str, float]:
    """Bytes of a rank of PartialFC's."""
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
    """The fewest GPUs, whole nodes beyond the first, whose memory suffices; None: no number up to 65,536 does.

    Rows of all ranks meet on each, so that more of them is not always less memory.
    """
    node = p.on.node
    for gpus in (*range(1, node), *range(node, MOST_GPUS + 1, node)):
        fewer = replace(p, gpus=gpus)
        if fits(p.on, sizes(fewer)):
            return gpus
    return None
