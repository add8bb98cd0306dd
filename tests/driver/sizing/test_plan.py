"""The plan: its formulas against measured memory and published figures; mistakes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from emulation import ROOT

from fastmargin.driver.commands import cli, scale
from fastmargin.driver.sizing import plan
from fastmargin.driver.sizing.plan import GB, Plan

PLAN = Plan(100_000_000, 512, 128, 64)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 0
    return capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- memory

CASES = [  # C, d, B, options; arrays above 32 MiB, which malloc gives back at once, but for the last
    (70_000, 128, 64, {}),
    (70_000, 128, 64, {"in_backward": False}),
    (70_000, 128, 64, {"optimizer": "adamw"}),
    (70_000, 128, 64, {"sample_rate": 0.1}),
    (20_000, 256, 1024, {}),
]
PEAKS = """
import ctypes, gc, json, sys, torch
from pathlib import Path
import fastmargin as fm

torch.set_num_threads(2)  # as the plan assumes

def status(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field)) * 1024

def steps(C, d, B, rate, optimizer, in_backward):
    head = fm.MarginHead(d, C, fm.ArcFace(), topk=1, sample_rate=rate)
    kind = {"sgd": fm.optim.ClassSGD, "adamw": fm.optim.ClassAdamW}[optimizer]
    update = kind(head, 0.1, in_backward=in_backward, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    f, y = torch.randn(B, d, requires_grad=True), torch.randint(C, (B,))
    for _ in range(2):
        head(f, y).loss.backward()
        update.step()
        update.zero_grad()

for case in json.loads(sys.argv[1]):
    steps(3000, 16, 16, *case[3:])  # so that one-time allocations do not count
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    steps(*case)
    print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
def test_memory_of_a_step_is_as_measured() -> None:
    """To a tenth or 6 MB. An array over all classes has 20 MB or more: one too many or too few is noticed."""
    plans = [Plan(C, d, B, 1, device="cpu", compute_dtype="fp32", **options) for C, d, B, options in CASES]  # type: ignore[arg-type]
    given = [(p.classes, p.dim, p.batch, p.sample_rate, p.optimizer, p.in_backward) for p in plans]
    command = [sys.executable, "-c", PEAKS, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    peaks = [float(line) for line in done.stdout.split()]
    assert peaks == [pytest.approx(sum(plan.memory(p).values()), rel=0.1, abs=6e6) for p in plans]


def test_what_each_option_costs() -> None:
    row = 4 * PLAN.dim * PLAN.held
    total = {name: sum(plan.memory(p).values()) for name, p in {
        "sgd": PLAN,
        "adamw": replace(PLAN, optimizer="adamw"),
        "gradient": replace(PLAN, in_backward=False),
        "backbone": replace(PLAN, backbone_gb=20.0),
    }.items()}  # fmt: skip
    assert total["adamw"] - total["sgd"] == row == total["gradient"] - total["sgd"]
    assert total["backbone"] - total["sgd"] == 20 * GB
    assert [plan.table_bytes(replace(PLAN, topk=k)) for k in (1, 10)] == [12 * PLAN.classes, 120 * PLAN.classes]


@pytest.mark.parametrize("p", [
    PLAN,
    replace(PLAN, classes=1_000_000_000, sample_rate=0.1),
    replace(PLAN, classes=1_000_000_000, device="v100", optimizer="adamw"),
    replace(PLAN, classes=3_000_000, device="v100", backbone_gb=25.0),
])  # fmt: skip
def test_the_smallest_number_fits_and_one_less_does_not(p: Plan) -> None:
    fewest = plan.smallest(p)
    assert fewest is not None and (fewest <= 8 or fewest % 8 == 0)

    def enough(gpus: int) -> bool:
        fewer = replace(p, gpus=gpus)
        return sum(plan.memory(fewer).values()) <= 0.9 * p.on.memory

    assert enough(fewest) and not any(enough(gpus) for gpus in range(1, fewest) if gpus <= 8 or gpus % 8 == 0)
    assert plan.smallest(replace(p, backbone_gb=200.0)) is None


def test_kept_exponentials_cost_memory_and_save_a_product() -> None:
    size = 2 * PLAN.rows * PLAN.held
    p, less = replace(PLAN, keep_bytes=size), replace(PLAN, keep_bytes=size - 1)
    assert plan.memory(p) == plan.memory(PLAN) | {"exponentials": size} and plan.memory(less) == plan.memory(PLAN)
    parts = plan.phases(p)
    assert [*parts] == ["forward z", "dx", "exponentials", "dw and update", "wire"]
    assert parts["exponentials"].bytes == 2 * size and plan.phases(less) == plan.phases(PLAN)
    assert replace(p, compute_dtype="fp16").kept == replace(p, device="cpu").kept == 0
    assert replace(p, compute_dtype="fp32").kept == 0 != replace(p, compute_dtype="fp32", keep_bytes=2 * size).kept


# ------------------------------------------------------------------------------------------------- wire and time


def test_wire_of_a_rank() -> None:
    """Of B rows in all (N - 1) / N: what fastmargin/distributed says; test_simulate.py compares with tensors."""
    sizes = plan.wire(replace(PLAN, topk=10))
    share = PLAN.rows * 63 / 64
    assert [*sizes.values()] == [share * n for n in (8, 2048, 8, 120, 12, 2048, 128)]
    assert plan.wire(replace(PLAN, gpus=1)) == {} and "wire" not in plan.phases(replace(PLAN, gpus=1))
    assert "mined table, all-gather" not in plan.wire(replace(PLAN, topk=0))


def test_time_is_that_of_the_slower() -> None:
    p = replace(PLAN, gpus=8, classes=8_000_000, topk=0)
    parts = plan.phases(p)
    product = 2 * 1024 * 1e6 * 512
    for phase in parts.values():
        rates = phase.flops / p.on.products["bf16"], phase.bytes / p.on.bandwidth
        assert phase.seconds == max(rates) or phase.bound == "link within the node"
    assert [phase.flops for phase in parts.values()] == [product] * 4 + [0]
    assert parts["dx"].seconds > product / p.on.products["bf16"] and parts["dx"].bound == "memory"
    assert parts["wire"].seconds == sum(plan.wire(p).values()) / p.on.link
    assert plan.phases(replace(p, gpus=16))["wire"].bound == "network"
    assert plan.seconds(p) == sum(phase.seconds for phase in parts.values()) and plan.bound(p) == "memory"


def test_a_class_chunk_that_the_cache_does_not_hold_goes_through_the_memory() -> None:
    p = replace(PLAN, gpus=8, classes=8_000_000, topk=0)  # 8,192 classes of 1,024 rows: 92 MB, in 50 MB
    x, chunks = 2 * 512 * 1024, -(-1_000_000 // 8192)
    assert [phase.bytes for phase in plan.phases(p).values()][:4] == [
        4 * 512 * 1e6 + chunks * x + 8 * 1024 * 1e6,
        4 * 512 * 1e6 + chunks * x + 8 * 1024 * 1e6,
        chunks * 8 * (4 * x) + 2 * 1024 * 1e6,  # eight sums of dx
        12 * 512 * 1e6 + chunks * x + 2 * 1024 * 1e6,
    ]
    few = plan.phases(replace(p, classes=32_000))  # 4,000 of a rank: 45 MB
    assert [few[name].bytes for name in ("forward z", "dx", "dw and update")] == [2048 * 4000, 0, 6144 * 4000]


@pytest.mark.parametrize(
    ("B", "d", "sums"), [(1024, 512, 8), (1, 1, 8), (1152, 512, 4), (4096, 512, 2), (8192, 512, 1), (65536, 512, 1)]
)
def test_sums_of_dx_are_a_power_of_two(B: int, d: int, sums: int) -> None:
    """As splits_of in csrc/cuda/nontarget_lse_glue.cpp has it."""
    p = Plan(10**6, d, B, 1)
    assert p.sums == sums and plan.memory(p)["rows"] == 32 * d * B + d * B * (10 + 4 * sums)
    assert replace(p, device="cpu").sums == 3


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"gpus": 1, "batch": 16}, "memory"),  # few rows: the weights are read faster than multiplied
        ({"gpus": 1024}, "memory"),  # too many for the cache
        ({"classes": 1_000_000}, "network"),
        ({"classes": 8_000, "gpus": 8}, "link within the node"),
        ({"compute_dtype": "fp32"}, "products"),
    ],
    ids=str,
)
def test_what_bounds_a_step(options: dict, bound: str) -> None:
    assert plan.bound(replace(PLAN, **options)) == bound


def test_sampled_classes() -> None:
    whole, tenth = PLAN, replace(PLAN, sample_rate=0.1)
    assert tenth.used == 0.1 * tenth.held + 128 and whole.used == whole.held
    assert replace(PLAN, classes=64, sample_rate=0.5).used == 1, "no more than there are"
    assert plan.seconds(tenth) < 0.2 * plan.seconds(whole)
    assert {"draw", "lazy updates"} == set(plan.phases(tenth)) - set(plan.phases(whole))
    assert "lazy updates" not in plan.phases(replace(tenth, optimizer="adamw")), "rows that sit out are frozen"


# ------------------------------------------------------------------------------------------------- published figures

PUBLISHED = {  # MiB of a GPU by millions of classes: 8 V100, B = 1,024; all classes, and a tenth
    1.0: {(0.25, 5826), (1.0, 9966), (2.0, 13978), (4.0, 23238), (5.5, 32188)},
    0.1: {(0.25, 5004), (1.0, 5620), (4.0, 8284), (8.0, 12310), (16.0, 19950), (29.0, 32324)},
}


@pytest.mark.parametrize("rate", PUBLISHED)
def test_partial_fc_grows_as_published(rate: float) -> None:
    """speed_benchmark.md of arcface_torch: what memory a class adds, to a tenth; its figures include the backbone."""
    (low, least), *_, (high, most) = sorted(PUBLISHED[rate])
    first, last = (sum(plan.partial_fc(Plan(int(C * 1e6), 512, 128, 8, rate, "v100")).values()) for C in (low, high))
    assert last - first == pytest.approx((most - least) * 2**20, rel=0.1)


@pytest.mark.parametrize("rate", PUBLISHED)
def test_what_was_published_fits(rate: float) -> None:
    """The largest of them, without the backbone, within nine tenths of the memory that nvidia-smi shows."""
    C, used = max(PUBLISHED[rate])
    p = Plan(int(C * 1e6), 512, 128, 8, rate, "v100")
    assert used * 2**20 < p.on.memory < 32 * 2**30 and plan.fits(p.on, plan.partial_fc(p))
    assert plan.fits(p.on, plan.memory(p))


def test_partial_fc_s_logits_do_not_shrink_with_more_gpus() -> None:
    few, many = (plan.partial_fc(replace(PLAN, gpus=gpus))["logits"] for gpus in (64, 6400))
    assert few == many == 28 * 128 * PLAN.classes


# ------------------------------------------------------------------------------------------------- the command


def test_it_answers_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "fastmargin", "plan", "--classes", "1e8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("Estimates by formula, not measured")
    assert "jsonargparse" in done.stderr and "| torch\n" not in done.stderr


def test_the_report_says_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "--classes", "100M", "--gpus", "64", "--backbone_gb", "20", "--optimizer", "adamw")
    for words in ("weight", "moments", "backbone", "rows, all-gather", "dw and update", "PartialFC", "host: 1.20 GB"):
        assert words in out
    sizes = plan.memory(replace(PLAN, backbone_gb=20.0, optimizer="adamw"))
    assert f"{sum(sizes.values()) / GB:.0f} of 151 GB" in out and "the fewest are 6" in out
    assert "no number of GPUs up to 65,536" in out, "PartialFC's logits"


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e8", 10**8), ("100M", 10**8), ("1_000_000", 10**6), ("2.5k", 2500), ("1B", 10**9), ("7", 7)],
)
def test_counts(text: str, number: int) -> None:
    assert scale.count("classes", text) == number


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "classes"),
        (["--classes", "many"], "classes is 'many'; want a whole number"),
        (["--classes", "1.5"], "classes is '1.5'"),
        (["--classes", "nan"], "classes is 'nan'"),
        (["--classes", "1e999"], "classes is '1e999'"),
        (["--classes", "1e6,"], "classes is ''"),
        (["--classes", "0"], "classes is 0; want 1 or more"),
        (["--classes", "1e6", "--gpus", "0"], "gpus is 0"),
        (["--classes", "1e6", "--dim", "-1"], "dim is -1"),
        (["--classes", "1e6", "--batch", "x"], "batch is 'x'"),
        (["--classes", "1e6", "--topk", "-1"], "topk is -1"),
        (["--classes", "1e6", "--sample_rate", "0"], "sample_rate is 0.0; want above 0, at most 1"),
        (["--classes", "1e6", "--sample_rate", "1.1"], "sample_rate is 1.1"),
        (["--classes", "1e6", "--backbone_gb", "-1"], "backbone_gb is -1.0"),
        (["--classes", "1e6", "--device", "tpu"], "device is 'tpu'; want one of h200, h100, a100, v100, cpu"),
        (["--classes", "1e6", "--device", "v100", "--compute_dtype", "bf16"], "want one of fp16, fp32"),
        (["--classes", "1e6", "--compute_dtype", "int8"], "compute_dtype"),
        (["--classes", "1e6", "--optimizer", "lars"], "optimizer"),
    ],
    ids=str,
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert cli.main(["plan", *arguments]) == cli.MISTAKE
    out = capsys.readouterr()
    assert out.err.startswith("fastmargin: ") and out.err.count("\n") == 1 and words in out.err
    assert out.out == ""


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_what_the_readme_says_of_eight_v100(rate: float) -> None:
    assert "fastmargin holds 49 M on those 8 V100" in (ROOT / "README.md").read_text()
    p = Plan(49_000_000, 512, 128, 8, rate, "v100", backbone_gb=5.0)
    assert plan.smallest(p) == 8 and plan.smallest(replace(p, classes=50_000_000)) != 8


def test_the_tables_of_the_readme_are_the_command_s(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    section = text.partition("## How large")[2].partition("\n## ")[0]
    commands = [line.split()[2:] for line in section.splitlines() if line.startswith("fastmargin plan")]
    assert len(commands) == 2
    for arguments in commands:
        _, _, table = said(capsys, *arguments).partition("\n\n")
        assert table.count("\n") >= 6 and table.strip() in section
