"""The Triton kernels: their tests of values in Triton's interpreter (test_kernels.py), chosen only by name, compiled
ahead of time."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dense import F64
from emulation import ROOT

from fastmargin.ops.backends import NATIVE_DEVICES, describe, pick
from fastmargin.ops.nontarget_lse import IMPLS

triton = pytest.importorskip("triton", reason="triton is not installed: its kernels are NOT tested")
from ahead_of_time import compiled, resources  # noqa: E402

from fastmargin.kernels import gradients, operands, tile_table, topk  # noqa: E402
from fastmargin.kernels import nontarget_lse as kernels  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def values(tmp_path_factory):
    """test_kernels.py and test_kept.py in a process that interprets the kernels, beside which the tests here run."""
    log = tmp_path_factory.mktemp("interpreter") / "log"
    tests = [str(Path(__file__).with_name(name)) for name in ("test_kernels.py", "test_kept.py", "test_counts.py")]
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-x", "-p", "no:cacheprovider", "-k", "interpreted"]
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=out, stderr=out
        ) as process,
    ):
        yield process, log
        process.kill()


# ---------------------------------------------------------------------------------------------- choice


def test_the_interpreter_runs_only_when_named(monkeypatch):
    monkeypatch.delenv("FASTMARGIN_BACKEND", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.ones(1, 2)
    assert pick(IMPLS, x) in ("native", "stream")
    assert pick(IMPLS, x, "triton") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run torch.float32 on cpu"):
        pick(IMPLS, x, "triton")


def test_the_order_of_preference(monkeypatch):
    monkeypatch.delenv("FASTMARGIN_BACKEND", raising=False)
    assert [name for name in IMPLS if name != "native"] == ["triton", "stream", "reference"]
    with torch._subclasses.FakeTensorMode():
        default = "native" if "cuda" in NATIVE_DEVICES else "stream"  # until triton has been measured on one
        assert pick(IMPLS, torch.empty(1, device="cuda")) == default
        assert pick(IMPLS, torch.empty(1, device="cuda"), "triton") == "triton"
        assert pick(IMPLS, torch.empty(1, dtype=F64, device="cuda")) == "stream"


def test_info_does_not_claim_a_gpu():
    line = next(line for line in describe().splitlines() if line.startswith("triton"))
    assert "never run on a GPU" in line


# ---------------------------------------------------------------------------------------------- compilation


POINTERS = {
    "y": "*i64",
    "class_ids": "*i64",
    "count": "*i64",
    "classes": "*i64",
    "entry_row": "*i64",
    "entry_class": "*i32",
    "bounds": "*i32",
}
NUMBERS = dict.fromkeys(
    ("B", "n", "m", "first", "strips", "splits", "w_row", "e_row", "groups_row", "fresh_row"), "i32"
) | {"kept_offset": "fp32"}


@pytest.fixture
def compile_clean(tmp_path, monkeypatch):
    """Compiles, and prints and checks what the code takes: no register on the stack, no more memory than there is."""

    def run(kernel, capability, constants, types, options=None, what=""):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        constants = constants | {name: 1 for name in ("w_feature",) if name in kernel.arg_names}
        code = compiled(kernel, capability, POINTERS | NUMBERS | types, constants, options or {})
        registers, stack, local = resources(code, tmp_path)
        shared = code.metadata.shared
        print(
            f"{kernel.__name__}{what}, sm_{capability}: {registers} registers, {stack + local} bytes spilled, "
            f"{shared} bytes shared"
        )
        assert 0 < registers <= 255 and stack == local == 0
        assert shared <= (227 if capability in (90, 100) else 99) * 1024  # what a program may have
        return code

    return run


ARCHITECTURES = {
    (tile_table.AMPERE, tile_table.FLOAT): (80, 90),  # float32 on Hopper too
    (tile_table.AMPERE, tile_table.HALF): (80,),
    (tile_table.HOPPER, tile_table.HALF): (90,),
    (tile_table.BLACKWELL, tile_table.HALF): (100,),
}
VARIANTS = {
    "normalized": ("bias", "count"),
    "sampled": ("bias",),
    "bias": ("residual_scale", "groups"),
    "kept": ("bias", "count"),
}  # arguments that are None
FWD, BWD = kernels.nontarget_lse_fwd_kernel, kernels.nontarget_lse_bwd_kernel


def instances():
    """Every tile of the table; the last of each row also with each variant, at one capability."""
    for key, rows in tile_table.TABLE.items():
        for limit, tile in rows:
            for capability in ARCHITECTURES[key]:
                every = limit is None and capability == ARCHITECTURES[key][0]
                for variant in ("normalized", "sampled", "bias") if every else ("normalized",):
                    for kernel in (FWD, BWD):
                        yield kernel, capability, key, tile, variant
                yield FWD, capability, key, tile_table.KEEPING.get(key, tile), "kept"
    two_on_a_multiprocessor = tile_table.Tile(128, 128, 64, 4, 2)
    for kernel, variant in ((FWD, "kept"), (FWD, "normalized"), (BWD, "normalized")):
        yield kernel, 90, (tile_table.HOPPER, tile_table.HALF), two_on_a_multiprocessor, variant


@pytest.mark.parametrize(("kernel", "capability", "key", "tile", "variant"), [*instances()], ids=str)
def test_products_compile_without_spills(compile_clean, kernel, capability, key, tile, variant):
    tma, size = key[0] != tile_table.AMPERE, key[1]
    options = tile_table.Plan(tile, tma, step=0, strip=4).options()
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    constants = options | dict(d=512, GROUP=operands.GROUP) | dict.fromkeys(VARIANTS[variant])
    if kernel is FWD and variant != "kept":
        constants["e"] = None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    element = "bf16" if size == tile_table.HALF else "fp32"
    types = dict.fromkeys("xoe", f"*{element}")
    if tma:
        shapes = {"x": (tile.rows, tile.features), "o": (tile.classes, tile.features), "e": (tile.rows, tile.classes)}
        types |= {name: f"tensordesc<{element}{[*shape]}>" for name, shape in shapes.items()}
    code = compile_clean(kernel, capability, constants, types, launch, f", {variant}, {element}, {tuple(tile)}")
    ptx = code.asm["ptx"]
    assert bool(re.search(r"cp\.async\.bulk\.tensor\.2d\.shared", ptx)) == tma  # loads by the copy engine
    if capability == 90 and tma:  # one step's products stay in flight while the next one's operands arrive
        assert re.search(r"wgmma\.mma_async\S+\.f32\.bf16", ptx) and re.search(r"wgmma\.wait_group\S+\s+1;", ptx)


ROWS = {
    "operands": (
        operands.operands_kernel, dict(COMPUTE=triton.language.bfloat16, **operands.whole_rows(512)), {"o": "*bf16"}
    ),
    "best groups": (topk.keep_best_kernel, dict(k=10, BLOCK_K=16, BLOCK=topk.SEARCHED), {"indices": "*i32"}),
    "scores": (
        topk.rescore_kernel,
        dict(COMPUTE=triton.language.bfloat16, NORMALIZE=True, GROUP=64, bias=None, **operands.whole_rows(512)),
        {"x": "*bf16", "groups": "*i32"},
    ),
    "weight gradient": (
        gradients.weight_gradient_kernel,
        dict(COMPUTE=triton.language.bfloat16, NORMALIZE=True, db=None, **operands.whole_rows(512)),
        {},
    ),
    "row gradient": (
        gradients.row_gradient_kernel,
        dict(ENTRIES=11, NORMALIZE=True, BLOCK_B=operands.whole_rows(512)["BLOCK_C"], BLOCK_D=512),
        {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize(("kernel", "constants", "types"), ROWS.values(), ids=ROWS)
def test_what_stands_around_the_products_compiles_without_spills(compile_clean, kernel, constants, types, capability):
    constants = constants if kernel is topk.keep_best_kernel else constants | {"d": 512}
    options = {"num_warps": 1} if kernel is topk.keep_best_kernel else {}
    compile_clean(kernel, capability, constants, types, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("B", "d", "n"), [(1, 512, 10**9), (4096, 512, 10**7), (65_536, 64, 10**6), (8, 3, 5)], ids=str
)
def test_memory_does_not_grow_with_the_number_of_classes(B, d, n, dtype):
    x = torch.empty(B, d, dtype=dtype)
    of_a_class = max(d * x.element_size(), 4 * B // operands.GROUP)  # of operands, of group maxima
    plan = tile_table.plan_of(x, n, of_a_class, products=1, launches=3)
    step = plan.step
    assert step % plan.tile.classes == 0 and step - plan.tile.classes < n
    assert (step - plan.tile.classes) * of_a_class <= tile_table.MOST_WORKSPACE
    chunks = -(-n // step)
    assert chunks == 1 or n - (chunks - 1) * step > step - chunks * plan.tile.classes  # the last is not much smaller
    strips = plan.grid(B, step)[1]
    assert plan.strip * strips * plan.tile.classes >= step > plan.strip * (strips - 1) * plan.tile.classes


@pytest.mark.parametrize("d", [64, 128, 512])
@pytest.mark.parametrize("B", [16, 256, 1024, 4096])
def test_a_chunk_takes_the_gpu_as_long_as_the_host(B, d):
    """Or it has the largest workspace; and no smaller one would do."""
    classes = tile_table.most_classes(B, d, 2 * max(B, d), products=3, launches=5)
    size = classes * 2 * max(B, d)
    work = [n * (3 * 2 * B * d / tile_table.FLOPS + 6 * d / tile_table.BANDWIDTH) for n in (classes, classes / 2)]
    assert operands.WORKSPACE <= size <= tile_table.MOST_WORKSPACE
    assert work[0] >= 5 * tile_table.LAUNCH * 0.999 or size == tile_table.MOST_WORKSPACE
    assert work[1] < 5 * tile_table.LAUNCH or size == operands.WORKSPACE


def test_the_table_holds_candidates():
    for key, rows in tile_table.TABLE.items():
        assert {tile for _, tile in rows} <= set(tile_table.CANDIDATES[key]) and rows[-1][0] is None
        assert tile_table.KEEPING.get(key, rows[0][1]) in tile_table.CANDIDATES[key]
        assert all(tile.classes % operands.GROUP == 0 for tile in tile_table.CANDIDATES[key])


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.timeout(900)  # two minutes on a quiet core
def test_values_under_the_interpreter(values):
    process, log = values
    assert process.wait() == 0, log.read_text()
    passed = re.search(r"(\d+) passed", log.read_text())
    assert passed and int(passed[1]) >= 80, log.read_text()
