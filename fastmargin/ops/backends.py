"""Which implementation of an op runs, and what the compiled extension offers.

Each op file has a dict of its implementations in order of preference: `native` (csrc), `triton` (kernels), `stream`
(portable PyTorch, blocked over classes), `reference` (stores B x C; the truth of the tests). A backend that is named,
by argument or by FASTMARGIN_BACKEND, runs or raises. Without a name it is `native` or, where that cannot run, `stream`.
Whether `native` or `triton` is faster on a GPU has not been measured: until then it is `native`.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Impl(NamedTuple):
    """One implementation of an op: its functions by role ("fwd", "bwd"), and where it can run."""

    functions: Mapping[str, Callable[..., Any]]
    can_run: Callable[[Tensor], bool]
    compute: Callable[[Tensor], tuple[torch.dtype, ...]] = lambda x: ()  # that operands of products may have
    keeps_operands: Callable[[Tensor], bool] = lambda w: False  # whether its step can write an OperandCache
    keeps_exponentials: Callable[[Tensor], bool] = lambda x: False  # whether its forward pass can: exponentials.py


class Build(NamedTuple):
    facts: dict[str, str]  # torch version, devices, CPU capability, compute dtypes; empty where it did not load
    problem: str  # why it did not load; empty where it did


def load() -> Build:
    """Loads the extension; that registers `torch.ops.fastmargin`."""
    try:
        native = importlib.import_module("fastmargin._C")
    except ModuleNotFoundError:
        return Build({}, "not built: no C++ compiler was found at installation")
    except ImportError as error:
        return not_loaded(f"it did not load; reinstall fastmargin ({error})")
    facts = native.build_facts()
    if facts["torch"] != torch.__version__:
        return not_loaded(f"built for torch {facts['torch']}, not {torch.__version__}; reinstall fastmargin")
    return Build(facts, "")


def not_loaded(problem: str) -> Build:
    warnings.warn(f"fastmargin: native kernels not used: {problem}", stacklevel=3)
    return Build({}, problem)


BUILD = load()
NATIVE_DEVICES = BUILD.facts.get("devices", "").split()
CPU_COMPUTE = tuple(getattr(torch, name) for name in BUILD.facts.get("compute", "").split())
HALVES = (torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None


def native_can_run(x: Tensor) -> bool:
    dtypes = (torch.float32, torch.float64) if x.device.type == "cpu" else (torch.float32,)
    return x.device.type in NATIVE_DEVICES and x.dtype in dtypes


def native_compute(x: Tensor) -> tuple[torch.dtype, ...]:
    return CPU_COMPUTE if x.device.type == "cpu" else HALVES


def triton_compute(x: Tensor) -> tuple[torch.dtype, ...]:
    return HALVES if x.is_cuda else (torch.float16,)  # the interpreter multiplies bfloat16 wrongly


def triton_can_run(x: Tensor) -> bool:
    """Compiled on a GPU; on the CPU only in Triton's interpreter, which TRITON_INTERPRET=1 turns on."""
    device = x.is_cuda or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return HAS_TRITON and device and x.dtype == torch.float32


# Run only when named: the truth of the tests, and kernels whose speed on a GPU has not been measured.
NAMED_ONLY = ("triton", "reference")


def named(impls: Mapping[str, Impl], name: str | None) -> str | None:
    """The backend that is asked for by name or, without one, by the environment; None: by neither.

    Raises ValueError for one that this installation does not have. Where it can run is only known at a call.
    """
    name = name or os.environ.get("FASTMARGIN_BACKEND") or None
    if name == "native" and BUILD.problem:
        raise ValueError(f"backend 'native' cannot run: {BUILD.problem}")
    if name == "triton" and not HAS_TRITON:
        raise ValueError("backend 'triton' cannot run: triton is not installed")
    if name is not None and name not in impls:
        raise ValueError(f"unknown backend {name!r}: want one of {', '.join(impls)}")
    return name


def pick(impls: Mapping[str, Impl], x: Tensor, name: str | None = None) -> str:
    """The name of the implementation that runs on x's device and dtype.

    Raises ValueError where a named one is unknown or cannot run there.
    """
    name = named(impls, name)
    if name is None:
        return next(n for n, impl in impls.items() if n not in NAMED_ONLY and impl.can_run(x))
    if not impls[name].can_run(x):
        raise ValueError(f"backend {name!r} cannot run {x.dtype} on {x.device}")
    return name


def pick_compute(
    impls: Mapping[str, Impl], name: str, x: Tensor, compute_dtype: torch.dtype | None
) -> torch.dtype | None:
    """The dtype that implementation `name` rounds the operands of its products to; None: no rounding.

    Where this machine has no such kernels, it warns once (never in compiled code) and float32 runs. Raises ValueError
    for a compute_dtype that rows of x's dtype cannot be rounded to.
    """
    check_compute_dtype(compute_dtype, x.dtype)
    if compute_dtype in (None, x.dtype):
        return None
    if compute_dtype in impls[name].compute(x):
        return compute_dtype
    if not torch.compiler.is_compiling():
        warn_of_float32(name, compute_dtype)
    return None


def check_compute_dtype(compute_dtype: torch.dtype | None, dtype: torch.dtype) -> None:
    """Raises ValueError unless rows of `dtype` can be rounded to `compute_dtype`."""
    if compute_dtype not in (None, dtype) and (compute_dtype not in HALVES or dtype != torch.float32):
        raise ValueError(
            f"compute_dtype = {compute_dtype} for {dtype} rows: want None, or torch.bfloat16 or torch.float16 for "
            "float32 rows"
        )


@functools.cache
def warn_of_float32(name: str, compute_dtype: torch.dtype) -> None:
    warnings.warn(f"fastmargin: no {compute_dtype} in the {name} kernels of this machine; using float32", stacklevel=4)


def describe() -> str:
    """The text of `fastmargin info`: versions, what was built, what can run, and what has never run."""
    facts, problem = BUILD
    native = f"{facts['cpu']} kernels, built for torch {facts['torch']}" if facts else problem
    compute = ", ".join(("float64", "float32", *facts["compute"].split())) if facts else ""
    compiled = "interpreted in tests, compiled ahead of time for sm_80 to sm_100, never run on a GPU"
    triton = compiled if HAS_TRITON else "triton not installed"
    cuda = "built" if "cuda" in NATIVE_DEVICES else "not built (this torch has no CUDA, or nvcc was not found)"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device here"
    return "\n".join(
        (
            f"torch      {torch.__version__}, {torch.get_num_threads()} threads",
            f"native     {native}",
            *([f"           operands of products: {compute}"] if facts else ()),
            f"triton     {triton}",
            "stream     portable PyTorch, any device",
            "reference  portable PyTorch, stores the logits; for tests",
            f"CUDA       {cuda}; {device}; compiled for sm_80 to sm_100 and emulated in tests, never run on a GPU",
        )
    )
