"""bench/gpu.sh without a GPU: a real run on the CPU; its order, choices and exit status with programs that pretend."""

import json
import os
import subprocess
import sys
from importlib import import_module

import pytest
import torch
from emulation import ROOT

STEPS = ["build", "smoke", "own", "tiles", "tests", "rivals", "memcheck", "racecheck"]
PYTHON = """#!/bin/bash
case "$*" in
  -c*sys.executable*) echo "$0" ;;
  *$FAILS*) exit 1 ;;
esac
"""
SANITIZER = """#!/bin/bash
[[ "$*" == *libcuda* ]] && echo "========= Error: Device not supported"
exit 0
"""


def run(out, *options, **environment):
    done = subprocess.run(
        ["bash", ROOT / "bench" / "gpu.sh", out, *options], capture_output=True, text=True, env=os.environ | environment
    )
    lines = (out / "parts.tsv").read_text().splitlines() if (out / "parts.tsv").exists() else []
    return done, dict(line.split("\t")[:2] for line in lines)


@pytest.fixture
def faked(tmp_path):
    """`run` where Python and what comes with CUDA only pretend; the commands that hold `fails` do not succeed."""
    for name, text in {"python3": PYTHON, "compute-sanitizer": SANITIZER, "nvidia-smi": "#!/bin/bash\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    return lambda *options, fails="nothing": run(
        tmp_path / "out", *options, PYTHON=str(tmp_path / "python3"), PATH=path, FAILS=fails
    )


@pytest.mark.timeout(900)
def test_a_dry_run(tmp_path):
    """Takes 40 s on a quiet core."""
    done, status = run(tmp_path, "--device", "cpu", PYTHON=sys.executable, OMP_NUM_THREADS="1")
    assert done.returncode == 0, (done.stdout, (tmp_path / "gpu.log").read_text())
    assert status == dict.fromkeys(STEPS[:6], "0")
    files = {path.name for path in tmp_path.iterdir()}
    assert files <= {"gpu.log", "parts.tsv", "smoke.json", "gpu.json", "tiles.json", "rivals.json"}
    own, rivals = (json.loads((tmp_path / name).read_text()) for name in ("gpu.json", "rivals.json"))
    assert "fastmargin stream, bfloat16" in own["shapes"]["6x16x300"]
    assert "eager, torch.cdist" in rivals["pairs"]["6x7x8"]
    assert all(error < 2e-2 for error in json.loads((tmp_path / "smoke.json").read_text()).values())


def test_steps_and_exit_status(faked):
    done, status = faked()
    assert done.returncode == 0, done
    assert status == dict.fromkeys(STEPS[:6], "0") | dict.fromkeys(STEPS[6:], "refused")
    assert list(status) == STEPS


@pytest.mark.parametrize("part, steps", [("1", STEPS[:4]), ("2", STEPS[4:])])
def test_a_part(faked, part, steps):
    assert list(faked("--part", part)[1]) == steps


def test_a_step_that_fails_does_not_stop_the_next(faked):
    done, status = faked("--only", "smoke,own,rivals", fails="gpu_smoke")
    assert done.returncode == 1 and status == {"smoke": "1", "own": "0", "rivals": "0"}


def test_the_packages_of_the_driver_need_not_be_there(faked):
    assert faked("--only", "build", fails="fastmargin info")[1] == {"build": "0"}


def test_no_time_left(faked):
    done, status = faked("--part", "1", "--budget", "0")
    assert done.returncode == 0 and status == dict.fromkeys(STEPS[:4], "no time")


@pytest.mark.parametrize("options", [("--part", "3"), ("--budget", "soon"), ("--budget",), ("--what", "1")])
def test_wrong_options(faked, options):
    done, status = faked(*options)
    assert done.returncode == 2 and "usage: bench/gpu.sh DIR" in done.stderr and not status


def bench_main(monkeypatch, out, *options):
    gpu = import_module("gpu")
    argv = ["gpu.py", str(out), "--device", "cpu", "--shapes", "4x8x50", "--pairs", *options]
    monkeypatch.setattr(sys, "argv", argv)
    gpu.main()


def test_a_contestant_of_ours_that_fails(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("no kernel\nfor this")

    gpu = import_module("gpu")
    heads = gpu.heads
    monkeypatch.setattr(gpu, "heads", lambda device: [("fastmargin broken", fails), *heads(device)])
    with pytest.raises(SystemExit, match=r"our own contestants failed:\nfastmargin broken: RuntimeError: no kernel$"):
        bench_main(monkeypatch, tmp_path, "--ours", "--only", "broken", "fastmargin stream")
    figures = json.loads((tmp_path / "gpu.json").read_text())["shapes"]["4x8x50"]
    assert list(figures) == ["fastmargin broken", "fastmargin stream, bfloat16", "fastmargin stream"]
    assert figures["fastmargin stream"]["forward"] > 0


def test_which_contestants_are_measured(monkeypatch, tmp_path):
    bench_main(monkeypatch, tmp_path, "--rivals", "--only", "InsightFace")
    assert list(json.loads((tmp_path / "rivals.json").read_text())["shapes"]["4x8x50"]) == ["InsightFace's op sequence"]


def test_with_very_many_classes_only_bfloat16_is_measured():
    gpu = import_module("gpu")
    options = gpu.argparse.Namespace(ours=False, rivals=False, only=[])
    with torch._subclasses.FakeTensorMode():
        names = [who for who, _ in gpu.contestants(torch.device("cuda"))]
    huge = [who for who in names if gpu.wanted(who, "4096x512x10000000", options)]
    assert "fastmargin triton, bfloat16" in huge and "eager, bfloat16 by autocast" in huge
    assert not {"fastmargin stream, bfloat16", "fastmargin triton", "eager"} & set(huge)
    assert not [who for who in huge if "compile" in who]
