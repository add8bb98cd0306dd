"""What a training run is: frozen dataclasses, filled from file, environment and command line by `driver.cli`.

Every default, its help text and its range live here and nowhere else. This module imports no torch, so that
`fastmargin --help` stays quick.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from fastmargin.require import require

GLYPHS = "glyphs"  # the source that needs no files


# Options that may change when a run is resumed.
FREE = ("data.workers", "data.cache", "tensorboard", "device", "log_every")


# Options whose 0 means that the number of images decides: see `settled`.
BY_IMAGES = ("optim.steps", "optim.batch_size")


FEW, EPOCHS = 5000, 20  # images below which steps are smaller and fewer; times that each image is seen at least


# What the glyph recipe was measured with; any other margin starts from its own defaults, the papers'.
MEASURED = {"ArcFace": {"s": 30.0, "m": 0.4}}


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    """Identities and their images; whole identities are held out for evaluation.

    A null is decided by the kind of the source: `driver.datasets` has the list. `fonts` and `faces` concern
    glyphs alone.
    """

    source: str = option(
        GLYPHS,
        "glyphs; synthetic:CLASSESxIMAGES; a folder that holds a folder of images for each identity; InsightFace's "
        "train.rec; an IDX file of images; Omniglot's zips, with commas between them; a safetensors file",
    )
    size: int | None = option(None, "pixels per side; null: photographs 112, characters 32, tensors as they are")
    color: Literal["gray", "rgb"] | None = option(None, "null: the images' own")
    augment: Literal["glyphs", "faces", "none"] | None = option(
        None, "glyphs: rotation, shift, blur, noise; faces: mirror, crop, shift, color, erasing; null: by source"
    )
    holdout: float = option(0.2, "share of the identities that training never sees")
    split_seed: int = option(0, "which identities are held out")
    cache: str | None = option(None, "folder of rendered and packed images; null: ~/.cache/fastmargin")
    workers: int = option(0, "threads that prepare batches ahead, worth it with a GPU; no result depends on them")
    fonts: str | None = option(None, "glyphs: folder of .ttf, .otf, .ttc files; null: the fonts matplotlib ships")
    faces: int = option(6, "glyphs: an identity has at least this many different images")

    def __post_init__(self) -> None:
        require(self.size is None or self.size >= 16, "data.size", self.size, "at least 16 pixels")
        require(0 <= self.split_seed < 2**63, "data.split_seed", self.split_seed, "0 or more, below 2**63")
        require(0 < self.holdout < 1, "data.holdout", self.holdout, "a share between 0 and 1, both excluded")
        require(self.workers >= 0, "data.workers", self.workers, "0 or more threads")
        require(self.faces >= 2, "data.faces", self.faces, "at least 2")
        require(self.fonts is None or self.source == GLYPHS, "data.fonts", self.fonts, "null: glyphs alone have fonts")

    def cache_folder(self) -> Path:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(self.cache) if self.cache is not None else Path(home) / "fastmargin"


@dataclass(frozen=True)
class ModelConfig:
    """The backbone. A factory of your own comes in through `train.train(..., model=...)`, never from here."""

    name: Literal[
        "cnn", "iresnet18", "iresnet34", "iresnet50", "iresnet100", "sphereface20", "mobilefacenet", "doppelganger"
    ] = option("cnn", "network, see fastmargin.models")  # fmt: skip
    output: Literal["A", "B", "C", "D", "E"] | None = option(None, "last layers of an iresnet; null: E")
    dropout: float | None = option(None, "share of features an iresnet's output E drops in training; null: 0.4")

    def arguments(self) -> dict[str, Any]:
        """What the network's factory is given; what is absent keeps the factory's own default."""
        given = (("output", self.output), ("dropout", self.dropout))
        return {name: value for name, value in given if value is not None}


@dataclass(frozen=True)
class HeadConfig:
    """The margin head."""

    margin: Literal[
        "Softmax", "NormFace", "L2Softmax", "SphereFace", "CosFace", "AMSoftmax",
        "ArcFace", "AdaFace", "MagFace", "ElasticFace",
    ] = option("ArcFace", "margin of the target")  # fmt: skip
    s: float | None = option(None, "scale; null: 30 for ArcFace, else the margin's own default")
    m: float | None = option(
        None,
        "margin, of an angle in radians (ArcFace, AdaFace, ElasticFace), a cosine (CosFace, AMSoftmax) or a factor of "
        "the angle (SphereFace); null: 0.4 for ArcFace, else the margin's own default",
    )
    ramp: float | None = option(
        None, "share of the steps over which m grows linearly from 0; 0: none; null: 0.3 where the margin has one m"
    )
    topk: int = option(1, "nearest wrong classes mined per row")
    backend: Literal["native", "stream", "reference"] | None = option(None, "null: the fastest that can run")
    sample_rate: float = option(1.0, "share of the classes drawn for each step, beside the batch's own and mined ones")
    compute_dtype: Literal["bf16", "fp16"] | None = option(
        None, "what rows and weights are rounded to for products over all classes; null: float32"
    )

    def __post_init__(self) -> None:
        require(self.ramp is None or 0 <= self.ramp <= 1, "head.ramp", self.ramp, "a share from 0 to 1")
        require(0 < self.sample_rate <= 1, "head.sample_rate", self.sample_rate, "a share above 0, at most 1")
        require(self.topk >= 1, "head.topk", self.topk, "at least 1: the doppelganger table needs one")

    def arguments(self) -> dict[str, float]:
        """What the margin's constructor is given; what is absent keeps the margin's own default."""
        given = {name: value for name, value in (("s", self.s), ("m", self.m)) if value is not None}
        return {**MEASURED.get(self.margin, {}), **given}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, the course of its learning rate, and what a step is made of: see `driver.optimizers`."""

    name: Literal["sgd", "adamw"] = option("sgd", "optimizer of all weights; adamw wants an lr of about 1e-3")
    steps: int = option(
        0, "optimizer steps of the whole run; 0: 20 epochs, but at least 1,600, below 5,000 images at least 800"
    )
    batch_size: int = option(0, "images per step, of all processes together; 0: 256, below 5,000 images 64")
    accumulation: int = option(
        1, "parts of a step's images that go through network and head one by one, to save memory"
    )
    lr: float = option(0.1, "learning rate at the end of the warm-up")
    head_lr: float = option(1.0, "learning rate of what the head learns, in units of lr")
    warmup: int | None = option(None, "steps of linear warm-up; null: 100, but at most a quarter of the steps")
    schedule: Literal["cosine", "steps", "constant"] = option("cosine", "learning rate after the warm-up")
    final_lr: float = option(0.01, "cosine: share of lr left at its end")
    cycle: int | None = option(None, "cosine: steps to its first restart (SGDR); null: none, it ends with the run")
    cycle_factor: int = option(1, "cosine: length of a cycle, in units of the one before")
    milestones: tuple[int, ...] = option((), "steps: after so many steps of the run the learning rate falls")
    milestone_factor: float = option(0.1, "steps: what it is multiplied by at each")
    momentum: float = option(0.9, "sgd: momentum")
    nesterov: bool = option(True, "sgd: Nesterov's look ahead")
    betas: tuple[float, float] = option((0.9, 0.999), "adamw: decay of the averages of gradient and squared gradient")
    weight_decay: float = option(5e-4, "on every parameter: convolutions, norms and class weights alike")
    clip: float | None = option(None, "longest gradient of all weights together, in the 2-norm; null: any")
    precision: Literal["bf16", "fp16"] | None = option(
        None, "autocast of the network, fp16 with a scaled loss; the head and the weights stay float32; null: float32"
    )
    ema: float | None = option(
        None, "decay per step of an average of the weights, which is then evaluated and exported; null: none"
    )

    def __post_init__(self) -> None:
        low, high = self.betas
        parts, milestones = self.accumulation, self.milestones
        require(self.steps >= 0, "optim.steps", self.steps, "at least 1, or 0")
        require(self.batch_size == 0 or self.batch_size >= 2, "optim.batch_size", self.batch_size, "at least 2, or 0")
        size = self.batch_size or 64
        divides = parts >= 1 and size % parts == 0 and size // parts >= 2
        require(divides, "optim.accumulation", parts, f"a divisor of the {size} images, 2 or more in a part")
        require(0 < self.lr < math.inf, "optim.lr", self.lr, "a number above 0")
        require(0 <= self.head_lr < math.inf, "optim.head_lr", self.head_lr, "a number of 0 or more")
        warm = self.warm_up()
        require(warm >= 0, "optim.warmup", warm, "0 or more steps")
        short = self.steps == 0 or warm < self.steps
        require(short, "optim.warmup", warm, f"less than the {self.steps} steps, or the rate never gets to optim.lr")
        require(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "a share from 0 to 1")
        cosine, steps = self.schedule == "cosine", self.schedule == "steps"
        require(self.cycle is None or cosine, "optim.cycle", self.cycle, "null: the cosine alone has cycles")
        require(self.cycle is None or self.cycle >= 1, "optim.cycle", self.cycle, "at least 1 step")
        require(self.cycle_factor >= 1, "optim.cycle_factor", self.cycle_factor, "at least 1")
        rising = milestones == tuple(sorted(set(milestones))) and all(m >= 1 for m in milestones)
        require(rising, "optim.milestones", milestones, "numbers of steps from 1, in rising order")
        wanted = "one or more" if steps else "none: the schedule 'steps' alone has them"
        require(bool(milestones) == steps, "optim.milestones", milestones, wanted)
        require(0 < self.milestone_factor <= 1, "optim.milestone_factor", self.milestone_factor, "above 0, at most 1")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "from 0, below 1")
        ahead = not self.nesterov or self.momentum > 0 or self.name == "adamw"
        require(ahead, "optim.nesterov", self.nesterov, "false: there is no momentum")
        require(0 <= low < 1 and 0 <= high < 1, "optim.betas", self.betas, "two numbers from 0, below 1")
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.clip is None or 0 < self.clip < math.inf, "optim.clip", self.clip, "a number above 0")
        require(self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "between 0 and 1, both excluded")

    def warm_up(self) -> int:
        """Steps of it, once the number of steps is known."""
        return min(100, self.steps // 4) if self.warmup is None else self.warmup


@dataclass(frozen=True)
class SamplerConfig:
    """Which images make a batch. The last three options concern the doppelganger sampler alone."""

    name: Literal["uniform", "doppelganger"] = option("uniform", "images, or classes with look-alikes")
    random_classes: float = option(
        1 / 3, "classes of a batch drawn at random, not mined: a share of them, up to 1, or from 2 on how many"
    )
    counts: tuple[int, int] = option((2, 8), "fewest and most images of a class in a batch, but for its last two")
    lag: int = option(8, "batches drawn ahead of the table")

    def __post_init__(self) -> None:
        low, high = self.counts
        drawn = self.random_classes
        allowed = 0 < drawn <= 1 or (drawn >= 2 and drawn % 1 == 0)
        require(allowed, "sampler.random_classes", drawn, "a share above 0, at most 1, or a whole number from 2 on")
        require(1 <= low <= high, "sampler.counts", self.counts, "two numbers, 1 <= fewest <= most")
        require(self.lag >= 1, "sampler.lag", self.lag, "at least 1")

    def share_or_number(self) -> float | int:
        """`random_classes` as the sampler takes it. 1 is the share here, as 1.0 is; a small share makes one chain."""
        return float(self.random_classes) if self.random_classes <= 1 else int(self.random_classes)


@dataclass(frozen=True)
class TermConfig:
    """A term of the loss beside the head's; `driver.terms` has the names and the options."""

    weight: float = option(1.0, "factor of the term")
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "arguments of the term"})


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    terms: dict[str, TermConfig] = field(
        default_factory=dict,
        metadata={"help": "losses beside the head's, by name: center, git, minimum_margin, marginal, range, "
                          "margin_based, or a class of pytorch_metric_learning.losses. Each has a weight (1) and "
                          "options, the arguments of its function or class by name"},
    )  # fmt: skip
    init_from: str | None = option(
        None, "folder of another run, or of a checkpoint of it, whose weights training starts from"
    )
    dim: int = option(128, "features of the embedding")
    seed: int = option(0, "weights, order of the images, augmentation, and whatever a step draws")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; null: cuda where there is a GPU, else cpu")
    log_every: int = option(20, "steps between two records")
    save_every: int = option(400, "steps between two checkpoints")
    tensorboard: bool = option(False, "write the records as TensorBoard's scalars too, into RUN/tensorboard")

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            require(0 <= term.weight < math.inf, f"terms.{name}.weight", term.weight, "a number of 0 or more")
            require(isinstance(term.options, Mapping), f"terms.{name}.options", term.options, "arguments by name")
            moved = name == "minimum_margin" and term.options.get("route") == "centers"
            plain = self.optim.accumulation == 1 and self.optim.precision != "fp16"
            wanted = "another: its centers step by themselves, without optim.accumulation and the scale of fp16"
            require(plain or not moved, f"terms.{name}.options.route", "centers", wanted)
            means = name in ("center", "git") and term.options.get("reduction", "mean") == "mean"
            wanted = f"1 beside the term {name}: parts hold other pairs than the whole, and their sums are no sum"
            require(means or self.optim.accumulation == 1, "optim.accumulation", self.optim.accumulation, wanted)
        require(self.dim >= 1, "dim", self.dim, "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        require(self.log_every >= 1, "log_every", self.log_every, "at least 1 step")
        require(self.save_every >= 1, "save_every", self.save_every, "at least 1 step")


@dataclass(frozen=True)
class CleanConfig:
    """What `fastmargin clean` lists."""

    source: str | None = option(None, "data to clean, as train's data.source; null: the run's own, held out or not")
    against: str | None = option(None, "other data, as a test set, whose identities should not be among these")
    below: float | None = option(None, "images with a smaller cosine to their identity's center are listed for removal")
    above: float = option(0.45, "pairs of identities are listed from this cosine of their centers on")
    limit: int = option(20, "lines of each list that are printed")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; null: cuda where there is a GPU, else cpu")

    def __post_init__(self) -> None:
        require(self.below is None or -1 <= self.below <= 1, "below", self.below, "a cosine, from -1 to 1")
        require(-1 <= self.above <= 1, "above", self.above, "a cosine, from -1 to 1")
        require(self.limit >= 1, "limit", self.limit, "at least 1 line")


Config = TypeVar("Config")


def from_dict(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass `kind` from nested mappings. ValueError names a key that is no option."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"unknown option {', '.join(unknown)}; {kind.__name__} has {', '.join(hints)}")

    def value(name: str, given: Any) -> Any:
        if is_dataclass(hints[name]):
            require(isinstance(given, Mapping), name, given, "options of its own")
            return from_dict(hints[name], given)
        if hints[name] == dict[str, TermConfig]:
            require(isinstance(given, Mapping), name, given, "terms by name")
            return {term: from_dict(TermConfig, options) for term, options in given.items()}
        return tuple(given) if isinstance(given, list) else given

    for name, given in values.items():
        admitted = choices(hints[name])
        require(not admitted or given in admitted, name, given, f"one of {admitted}")
    return kind(**{name: value(name, given) for name, given in values.items()})


def choices(hint: Any) -> tuple[Any, ...]:
    """What a Literal admits, or a Literal or None; nothing for other types."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    none = (None,) if literals and type(None) in get_args(hint) else ()
    return tuple(choice for literal in literals for choice in get_args(literal)) + none


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted option names and their values, in order, as JSON knows them (a tuple is a list)."""
    flat: dict[str, Any] = {}
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{entry.name}.")
        elif isinstance(value, dict):
            flat[prefix + entry.name] = {name: asdict(term) for name, term in value.items()}
        else:
            flat[prefix + entry.name] = list(value) if isinstance(value, tuple) else value
    return flat


def settled(config: TrainConfig, images: int) -> TrainConfig:
    """The configuration with what the number of images to train on decides."""
    few = images < FEW
    size = config.optim.batch_size or (64 if few else 256)
    steps = config.optim.steps or max(800 if few else 1600, math.ceil(EPOCHS * images / size))
    return replace(config, optim=replace(config.optim, batch_size=size, steps=steps))


def differing(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """Dotted names of the options in which two configurations differ and their results may."""
    other = flatten(theirs)
    return [
        name
        for name, value in flatten(ours).items()
        if value != other[name] and name not in FREE and not (name in BY_IMAGES and value == 0)
    ]
