"""Type checkers see the public names: they refuse wrong arguments in a user's file."""

import ast
import subprocess
import sys

import pytest
from emulation import ROOT

import fastmargin as fm

pytest.importorskip("mypy")

RIGHT = """
import torch
import fastmargin as fm

head = fm.MarginHead(512, 1000, fm.ArcFace(s=64.0, m=0.5, beyond="none"), topk=1)
out = head.forward(torch.ones(2, 512), torch.tensor([0, 1]))
scores: torch.Tensor = out.hard_scores
nearest: fm.Nearest = head.nearest(torch.ones(2, 512), k=3)
optimizer: torch.optim.Optimizer = fm.optim.ClassSGD(head, lr=0.1)
loss = fm.center_loss(torch.ones(2, 512), torch.tensor([0, 1]), fm.CenterBank(512, 1000).centers)
model = fm.models.build_model("cnn", 512, 32)
accuracy: float = fm.evaluation.best_accuracy(torch.ones(3), torch.zeros(3))
"""
WRONG = {
    'fm.MarginHead(512, "oops", nonsense=3)': ("arg-type", "call-arg"),
    "fm.ArcFace(0.5)": ("call-arg",),
    'fm.CosFace(beyond="mono")': ("typeddict-item", "arg-type"),
    "fm.ArcFaceLoss()": ("attr-defined",),
    "fm.CenterBank(512, 1000).update(1)": ("call-arg",),
    "fm.checkpoint.part_of": ("attr-defined",),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """{line: what mypy says of it} of a user's file, outside the source tree."""
    folder = tmp_path_factory.mktemp("user")
    file = folder / "user.py"
    file.write_text(RIGHT + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file=", "--cache-dir", folder / "cache", "--show-error-codes"]
    done = subprocess.run(
        [*command, file.name], cwd=folder, env={"MYPYPATH": str(ROOT)}, capture_output=True, text=True, timeout=240
    )
    said: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith("user.py:"):
            number = int(line.split(":")[1])
            said[number] = said.get(number, "") + line
    assert said, done.stdout + done.stderr
    return said


def test_a_right_use_is_accepted(errors):
    assert [text for line, text in errors.items() if line <= RIGHT.count("\n")] == []


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_use_is_refused(errors, line):
    said = errors.get(RIGHT.count("\n") + 1 + [*WRONG].index(line), "nothing")
    assert any(f"[{code}]" in said for code in WRONG[line]), said


def test_type_checkers_and_python_have_the_same_names():
    body = ast.parse((ROOT / "fastmargin" / "__init__.py").read_text()).body
    block = next(node for node in body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    homes = {alias.name: node.module for node in imports for alias in node.names}
    assert sorted([*homes, "__version__"]) == sorted(fm.__all__)
    assert {name: module for name, module in homes.items() if module != "fastmargin"} == fm._HOME


def test_the_marker_of_typed_packages_is_installed(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "--egg-base",
        tmp_path,
        "build_py",
        "--build-lib",
        tmp_path,
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    assert (tmp_path / "fastmargin" / "py.typed").is_file()
