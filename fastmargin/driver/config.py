"""The configuration of a training run: frozen dataclasses, filled from file, environment and command line by
`driver.commands.cli`.

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

FEW = 5000  # a data set of fewer images gets smaller batches, and may have fewer steps
EPOCHS = 20  # at least so many, where the number of images decides

# The glyph recipe was measured with these; any other margin has the defaults of its paper.
MEASURED = {"ArcFace": {"s": 30.0, "m": 0.4}}


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DataConfig:
    """Identities and their images; whole identities are held out for evaluation.

    What a null stands for depends on the kind of the source: `driver.data.sources` has the list. `fonts` and `faces`
    are options of glyphs only.
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
    """The backbone. A factory of your own is an argument of `train.train(..., model=...)`, never an option."""

    name: Literal[
        "cnn", "iresnet18", "iresnet34", "iresnet50", "iresnet100", "sphereface20", "mobilefacenet", "doppelganger"
    ] = option("cnn", "network, see fastmargin.models")  # fmt: skip
    output: Literal["A", "B", "C", "D", "E"] | None = option(None, "last layers of an iresnet; null: E")
    dropout: float | None = option(None, "share of features that output E of an iresnet drops in training; null: 0.4")

    def arguments(self) -> dict[str, Any]:
        """Arguments for the factory of the network; without an entry, the factory's own default holds."""
        given = (("output", self.output), ("dropout", self.dropout))
        return {name: value for name, value in given if value is not None}


@dataclass(frozen=True)
class HeadConfig:
    """The margin head."""

    margin: Literal[
        "Softmax", "NormFace", "L2Softmax", "SphereFace", "CosFace", "AMSoftmax",
        "ArcFace", "AdaFace", "MagFace", "ElasticFace",
    ] = option("ArcFace", "margin of the target logit")  # fmt: skip
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
        None, "type to which features and weights are rounded for the products over all classes; null: float32"
    )
    keep_bytes: int = option(
        0, "memory, on a GPU, for exponentials kept for the backward pass, which then makes no logits; see MarginHead"
    )

    def __post_init__(self) -> None:
        require(self.ramp is None or 0 <= self.ramp <= 1, "head.ramp", self.ramp, "a share from 0 to 1")
        require(0 < self.sample_rate <= 1, "head.sample_rate", self.sample_rate, "a share above 0, at most 1")
        require(self.keep_bytes >= 0, "head.keep_bytes", self.keep_bytes, "0 or more")
        require(self.topk >= 1, "head.topk", self.topk, "at least 1: the doppelganger table needs it")

    def arguments(self) -> dict[str, float]:
        """Arguments for the constructor of the margin; without an entry, the margin's own default holds."""
        given = {name: value for name, value in (("s", self.s), ("m", self.m)) if value is not None}
        return {**MEASURED.get(self.margin, {}), **given}


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer, its learning rate schedule, and what makes up a step: see `driver.training.optimizers`."""

    name: Literal["sgd", "adamw"] = option("sgd", "optimizer of all weights; adamw needs an lr of about 1e-3")
    steps: int = option(
        0, "optimizer steps of the whole run; 0: 20 epochs, but at least 1,600, below 5,000 images at least 800"
    )
    batch_size: int = option(0, "images per step, of all processes together; 0: 256, below 5,000 images 64")
    accumulation: int = option(
        1, "parts into which a batch is cut; network and head take one after another, to save memory"
    )
    lr: float = option(0.1, "learning rate at the end of the warm-up")
    head_lr: float = option(1.0, "learning rate of the head's parameters, as a multiple of lr")
    warmup: int | None = option(None, "steps of linear warm-up; null: 100, but at most a quarter of the steps")
    schedule: Literal["cosine", "steps", "constant"] = option("cosine", "learning rate after the warm-up")
    final_lr: float = option(0.01, "cosine: share of lr left at its end")
    cycle: int | None = option(None, "cosine: steps to its first restart (SGDR); null: none, it ends with the run")
    cycle_factor: int = option(1, "cosine: length of a cycle, as a multiple of the one before")
    milestones: tuple[int, ...] = option((), "steps: numbers of steps after which the learning rate falls")
    milestone_factor: float = option(0.1, "steps: factor of the learning rate at each")
    momentum: float = option(0.9, "sgd: momentum")
    nesterov: bool = option(True, "sgd: Nesterov momentum")
    betas: tuple[float, float] = option((0.9, 0.999), "adamw: decay of the averages of gradient and squared gradient")
    weight_decay: float = option(5e-4, "on every parameter: convolutions, norms and class weights alike")
    clip: float | None = option(None, "largest 2-norm of the gradient of all weights together; null: no clipping")
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
        require(short, "optim.warmup", warm, f"less than the {self.steps} steps, or the rate never reaches optim.lr")
        require(0 <= self.final_lr <= 1, "optim.final_lr", self.final_lr, "a share from 0 to 1")
        cosine, steps = self.schedule == "cosine", self.schedule == "steps"
        require(self.cycle is None or cosine, "optim.cycle", self.cycle, "null: only the cosine has cycles")
        require(self.cycle is None or self.cycle >= 1, "optim.cycle", self.cycle, "at least 1 step")
        require(self.cycle_factor >= 1, "optim.cycle_factor", self.cycle_factor, "at least 1")
        rising = milestones == tuple(sorted(set(milestones))) and all(m >= 1 for m in milestones)
        require(rising, "optim.milestones", milestones, "numbers of steps from 1, in rising order")
        want = "one or more" if steps else "none: only the schedule 'steps' has them"
        require(bool(milestones) == steps, "optim.milestones", milestones, want)
        require(0 < self.milestone_factor <= 1, "optim.milestone_factor", self.milestone_factor, "above 0, at most 1")
        require(0 <= self.momentum < 1, "optim.momentum", self.momentum, "from 0, below 1")
        ahead = not self.nesterov or self.momentum > 0 or self.name == "adamw"
        require(ahead, "optim.nesterov", self.nesterov, "false: there is no momentum")
        require(0 <= low < 1 and 0 <= high < 1, "optim.betas", self.betas, "two numbers from 0, below 1")
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", self.weight_decay, "0 or more")
        require(self.clip is None or 0 < self.clip < math.inf, "optim.clip", self.clip, "a number above 0")
        require(self.ema is None or 0 < self.ema < 1, "optim.ema", self.ema, "between 0 and 1, both excluded")

    def warm_up(self) -> int:
        """The number of warm-up steps, once the number of steps is known."""
        return min(100, self.steps // 4) if self.warmup is None else self.warmup


@dataclass(frozen=True)
class SamplerConfig:
    """Which images make a batch. The last three options are of the doppelganger sampler only."""

    name: Literal["uniform", "doppelganger"] = option(
        "uniform", "uniform: images; doppelganger: classes with their look-alikes"
    )
    random_classes: float = option(
        1 / 3, "classes of a batch that are drawn at random, not mined: a share up to 1, or a number from 2 on"
    )
    counts: tuple[int, int] = option(
        (2, 8), "fewest and most images of a class in a batch; its last two may have fewer or more"
    )
    lag: int = option(8, "a batch is drawn from the table as it was so many steps before")

    def __post_init__(self) -> None:
        low, high = self.counts
        drawn = self.random_classes
        allowed = 0 < drawn <= 1 or (drawn >= 2 and drawn % 1 == 0)
        require(allowed, "sampler.random_classes", drawn, "a share above 0, at most 1, or a whole number from 2 on")
        require(1 <= low <= high, "sampler.counts", self.counts, "two numbers, 1 <= fewest <= most")
        require(self.lag >= 1, "sampler.lag", self.lag, "at least 1")

    def share_or_number(self) -> float | int:
        """`random_classes` as the sampler takes it: a float is a share, an int a number. Here 1 and 1.0 are the share.

        For one random class, the sampler's int 1, give a small share.
        """
        return float(self.random_classes) if self.random_classes <= 1 else int(self.random_classes)


@dataclass(frozen=True)
class TermConfig:
    """A term of the loss beside the head's; `driver.training.terms` has the names and the options."""

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
                          "margin_based, or a loss of pytorch-metric-learning. Each has a weight (1) and "
                          "options, the arguments of its function or class by name"},
    )  # fmt: skip
    init_from: str | None = option(
        None, "folder of another run, or of a checkpoint of it, whose weights training starts from"
    )
    dim: int = option(128, "features of the embedding")
    seed: int = option(0, "of the weights, the order of the images, augmentation, and all that a step draws at random")
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; null: cuda where there is a GPU, else cpu")
    log_every: int = option(20, "steps between two records")
    save_every: int = option(400, "steps between two checkpoints")
    tensorboard: bool = option(False, "write the records as TensorBoard scalars, too, into RUN/tensorboard")

    def __post_init__(self) -> None:
        for name, term in self.terms.items():
            require(0 <= term.weight < math.inf, f"terms.{name}.weight", term.weight, "a number of 0 or more")
            require(isinstance(term.options, Mapping), f"terms.{name}.options", term.options, "arguments by name")
            moved = name == "minimum_margin" and term.options.get("route") == "centers"
            plain = self.optim.accumulation == 1 and self.optim.precision != "fp16"
            want = (
                "another: its centers have their own step, which knows no optim.accumulation and no loss scale (fp16)"
            )
            require(plain or not moved, f"terms.{name}.options.route", "centers", want)
            means = name in ("center", "git") and term.options.get("reduction", "mean") == "mean"
            want = (
                f"1 beside the term {name}: over the parts of a batch it adds up to something else than over the whole"
            )
            require(means or self.optim.accumulation == 1, "optim.accumulation", self.optim.accumulation, want)
        require(self.dim >= 1, "dim", self.dim, "at least 1")
        require(0 <= self.seed < 2**63, "seed", self.seed, "0 or more, below 2**63")
        require(self.log_every >= 1, "log_every", self.log_every, "at least 1 step")
        require(self.save_every >= 1, "save_every", self.save_every, "at least 1 step")


@dataclass(frozen=True)
class CleanConfig:
    """What `fastmargin clean` lists."""

    source: str | None = option(
        None, "data to clean, as train's data.source; null: all data of the run, held out or not"
    )
    against: str | None = option(None, "other data, such as a test set, whose identities should not be among these")
    below: float | None = option(
        None, "images with a smaller cosine to the center of their identity are listed for removal"
    )
    above: float = option(0.45, "pairs of identities whose centers have this cosine or more are listed")
    limit: int = option(20, "lines of each list to print")
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
            for term, options in given.items():
                require(isinstance(options, Mapping), f"{name}.{term}", options, "a weight and options by name")
            return {term: from_dict(TermConfig, options) for term, options in given.items()}
        return tuple(given) if isinstance(given, list) else given

    for name, given in values.items():
        allowed = choices(hints[name])
        require(not allowed or given in allowed, name, given, f"one of {allowed}")
    return kind(**{name: value(name, given) for name, given in values.items()})


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a Literal, or of a Literal or None; none for other types."""
    literals = [part for part in (hint, *get_args(hint)) if get_origin(part) is Literal]
    none = (None,) if literals and type(None) in get_args(hint) else ()
    return tuple(choice for literal in literals for choice in get_args(literal)) + none


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted option names and their values, in order, as JSON has them (a tuple is a list)."""
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
    """The configuration with batch size and steps filled in where the number of training images decides them."""
    few = images < FEW
    size = config.optim.batch_size or (64 if few else 256)
    steps = config.optim.steps or max(800 if few else 1600, math.ceil(EPOCHS * images / size))
    return replace(config, optim=replace(config.optim, batch_size=size, steps=steps))


def differing(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """Dotted names of the options that differ between two configurations and may change the result."""
    other = flatten(theirs)
    return [
        name
        for name, value in flatten(ours).items()
        if value != other[name] and name not in FREE and not (name in BY_IMAGES and value == 0)
    ]
