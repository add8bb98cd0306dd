"""The rules of the package: imports point one way, public names resolve, files stay short, backends fall back."""

import ast
import graphlib
import json
import os
import platform
import re
import subprocess
import sys

import pytest
import torch
from emulation import ROOT

import fastmargin as fm
from fastmargin.ops.backends import BUILD, pick
from fastmargin.ops.nontarget_lse import IMPLS, nontarget_lse

LAYERS = (  # a part imports from itself and from the lines above its own
    ("_C", "files", "ops.problem", "require", "splitmix64", "torch_private"),
    ("ops.exponentials",),  # the layout of what the kernels keep
    ("kernels",),
    ("margins.angles",),
    ("margins",),
    ("ops.backends",),
    ("ops",),
    ("distributed.merge",),
    ("distributed",),
    ("head.checks", "head.sampling"),
    ("head.class_weights",),
    ("head",),
    ("losses", "mining", "evaluation", "models", "optim"),
    ("checkpoint", "compat"),
    ("driver", "driver.log", "driver.config", "driver.sizing"),
    ("driver.data",),
    ("driver.training",),
    ("driver.reports",),
    ("driver.commands",),
    ("__main__",),
)
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
KERNELS = {"kernels", "_C"}  # only ops imports them
FREE_OF = {  # what a part does not import, although it stands above
    "ops": {"margins", "margins.angles"},  # kernels know no margins
    "ops.backends": {"margins", "margins.angles"},
    "distributed": {"margins", "margins.angles"},
    "distributed.merge": {"margins", "margins.angles"},
    "mining": RANK.keys() - {*LAYERS[0], "ops"},
    **{part: RANK.keys() - set(LAYERS[0]) for part in ("evaluation", "models")},
}


def sources():
    """{module: its text} of the package; kernels/ is installed as fastmargin.kernels."""
    found = {}
    for folder, package in (("fastmargin", ("fastmargin",)), ("kernels", ("fastmargin", "kernels"))):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join((*package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path.read_text()
    return found


SOURCES = sources()


def imported(module, text):
    """The names a module imports, anywhere in it: `from a import b` gives a.b."""
    is_package = any(name.startswith(f"{module}.") for name in SOURCES)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) + is_package - node.level] if node.level else []
            yield from (".".join((*parents, *filter(None, [node.module]), alias.name)) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"  # torch.distributed needs no import of its own


def part(name):
    """The entry of LAYERS that a module, or a name in one, belongs to: the longest; else the first word."""
    words = name.split(".")[1:]
    found = (".".join(words[:n]) for n in range(len(words), 0, -1))
    return next((p for p in found if p in RANK), words[0] if words else "")


def violations(module, text):
    own = part(module)
    for name in imported(module, text):
        if name.split(".")[0] in ("tests", "bench", "conftest", "check"):
            yield f"{module} imports {name}"
        if name.startswith("torch.distributed") and own.split(".")[0] not in ("distributed", "driver"):
            yield f"{module} uses {name}"
        if not name.startswith("fastmargin.") or module == "fastmargin":  # the package itself stands above all
            continue
        other = part(name)
        if other in RANK and other != own and RANK[other] >= RANK.get(own, -1):
            yield f"{module} imports {name}"
        if other != own and (other in FREE_OF.get(own, ()) or (other in KERNELS and own.split(".")[0] != "ops")):
            yield f"{module} imports {name}"
        if other not in RANK and (own == "kernels" or other != "__version__"):
            yield f"{module} imports {name}: want the module that defines it"


def test_imports_point_one_way():
    assert {part(module) for module in SOURCES} - {""} <= set(RANK), "a new part needs its place in LAYERS"
    assert [module for module in SOURCES if part(module) == "driver"] == ["fastmargin.driver"], "so does one of driver/"
    assert [v for module, text in SOURCES.items() for v in violations(module, text)] == []
    margins = [module for module in SOURCES if part(module) in ("margins", "margins.angles")]
    homes = {name for module in margins for name in imported(module, SOURCES[module]) if name.startswith("fastmargin.")}
    assert {part(name) for name in homes} == {"margins", "margins.angles", "require"}, "psi knows no kernel and no rank"


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ops.checks", "from fastmargin.head.margin_head import MarginHead"),
        ("ops.checks", "from .. import head"),
        ("ops", "from ..head import MarginHead"),
        ("ops.checks", "import torch.distributed as dist"),
        ("ops.checks", "from torch import distributed"),
        ("ops.checks", "import torch\ntorch.distributed.barrier()"),
        ("ops.backends", "import fastmargin.ops.checks"),
        ("ops.backends", "def f():\n    from fastmargin.ops import checks"),
        ("kernels.nontarget_lse", "from fastmargin.ops import backends"),
        ("kernels.nontarget_lse", "from fastmargin import __version__"),
        ("head.margin_head", "from fastmargin.optim import ClassSGD"),
        ("head.margin_head", "from fastmargin import ArcFace"),
        ("evaluation", "from fastmargin.driver.data.identities import Identities"),
        ("driver.training.run", "from tests.check import error"),
        ("driver.training.loop", "from fastmargin.driver.reports import report"),
        ("driver.training.loop", "def f():\n    from fastmargin.driver.commands import evaluate"),
        ("driver.reports.plots", "from fastmargin.driver.commands.parser import parse"),
        ("driver.data.sources.folder", "from fastmargin.driver.training.run_folder import read_config"),
        ("driver.data.order", "from fastmargin.driver.training import run"),
        ("driver.sizing.plan", "from fastmargin.driver.commands import scale"),
        ("driver.sizing.simulate", "from fastmargin.driver.training import run"),
        ("driver.sizing.plan", "from fastmargin.driver.config import TrainConfig"),
        ("driver.log", "from .data import order"),
        ("driver.config", "from fastmargin.driver.data.order import Permutation"),
        ("optim", "from fastmargin.driver.config import OptimConfig"),
        ("margins.base", "from fastmargin.ops.nontarget_lse import nontarget_lse"),
        ("margins.angles", "from fastmargin.margins.base import Margin"),
        ("ops.nontarget_lse", "from fastmargin.margins.base import Margin"),
        ("distributed.functions", "from fastmargin.margins.angles import safe_acos"),
        ("distributed.layout", "from ..head.class_weights import ClassWeights"),
        ("head.class_weights", "from fastmargin.head.margin_head import MarginHead"),
        ("head.sampling", "from fastmargin.head.checks import check_labels"),
        ("head.margin_head", "from fastmargin.kernels import tiles"),
        ("mining", "from fastmargin.head.margin_head import MarginHead"),
        ("distributed.merge", "from fastmargin.distributed.layout import Layout"),
        ("mining", "import bench"),
    ],
)
def test_an_import_that_points_the_other_way_is_seen(module, line):
    assert list(violations(f"fastmargin.{module}", line))


def test_no_import_cycles():
    graph = {}
    for module, text in SOURCES.items():
        names = {n if n in SOURCES else n.rpartition(".")[0] for n in imported(module, text)}
        graph[module] = {n for n in names if n in SOURCES and n not in (module, "fastmargin")}
    assert "fastmargin.ops.backends" in graph["fastmargin.ops.nontarget_lse"]
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the cycle


# ---------------------------------------------------------------------------------------------- names and files


@pytest.mark.parametrize("name", fm.__all__)
def test_public_names_resolve_and_are_described(name):
    value = getattr(fm, name)
    assert name in dir(fm)
    if name != "__version__":
        assert vars(value)["__doc__"].strip() if isinstance(value, type) else value.__doc__.strip()


def public(tree):
    kinds = ast.FunctionDef | ast.ClassDef
    return [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_what_users_call_is_described():
    undescribed = []
    for module, text in SOURCES.items():
        whole = part(module) == "evaluation"
        for node in public(ast.parse(text)):
            named = part(module) in ("head", "losses", "margins", "mining", "optim")
            if whole or (named and node.name in fm.__all__):
                undescribed += [f"{module}.{node.name}"] * (ast.get_docstring(node) is None)
    assert undescribed == []
    assert [module for module, text in SOURCES.items() if text.strip() and not ast.get_docstring(ast.parse(text))] == []


def test_unknown_names():
    with pytest.raises(AttributeError, match="module 'fastmargin' has no attribute 'ArcFaceLoss'"):
        _ = fm.ArcFaceLoss


def test_no_file_is_long():
    folders = ("fastmargin", "kernels", "csrc", "tests", "bench")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.*")]
    kinds = (".py", ".h", ".cpp", ".cu", ".cuh")
    assert [p.name for p in files if p.suffix in kinds and len(p.read_text().splitlines()) > 400] == []


def named(line):
    """The paths that a line of the README's map names; those after the first may stand in the first one's folder."""
    first, *others = re.findall(r"[\w./]*/|[\w./]+\.(?:py|txt)", line)
    return [ROOT / first, *((ROOT / other if (ROOT / other).exists() else ROOT / first / other) for other in others)]


def test_the_map_in_the_readme_is_that_of_the_tree():
    section = (ROOT / "README.md").read_text().partition("\n## The house\n")[2].strip("\n").partition("\n\n")[0]
    paths = [path for line in section.splitlines() for path in named(line)]
    assert [path for path in paths if not path.exists()] == []
    folders = {path.parent for path in (ROOT / "fastmargin").rglob("*.py")} - {ROOT / "fastmargin"}
    assert folders | {ROOT / "kernels", ROOT / "csrc", ROOT / "tests", ROOT / "bench"} <= set(paths)


# ---------------------------------------------------------------------------------------------- backends


def python(code, **environment):
    """The JSON that a fresh interpreter prints, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_importing_the_package_does_not_import_torch():
    assert python("import json, sys, fastmargin; print(json.dumps('torch' in sys.modules))") == (False, "")


WITHOUT_NATIVE = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name == "fastmargin._C":
            raise {error}(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())

import torch, fastmargin as fm
from fastmargin.ops import backends
from fastmargin.ops.nontarget_lse import IMPLS
try:
    fm.nontarget_lse(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64), backend="native")
    refusal = None
except ValueError as mistake:
    refusal = str(mistake)
out = fm.MarginHead(4, 5, fm.ArcFace(), topk=1)(torch.ones(2, 4), torch.tensor([0, 1]))
out.loss.backward()
print(json.dumps(dict(
    facts=backends.BUILD.facts, pick=backends.pick(IMPLS, torch.ones(1)), refusal=refusal,
    describe=backends.describe(), loss=out.loss.item(),
)))
"""


@pytest.mark.parametrize(("exception", "why"), [("ModuleNotFoundError", "not built"), ("ImportError", "did not load")])
def test_without_the_extension_the_package_works_and_says_why(exception, why):
    said, warned = python(WITHOUT_NATIVE.format(error=exception))
    assert said["facts"] == {} and said["pick"] == "stream" and said["loss"] > 0
    native = next(line for line in said["describe"].splitlines() if line.startswith("native"))
    assert why in native
    assert said["refusal"] is not None and why in said["refusal"]
    assert warned.count("UserWarning") == (exception == "ImportError")  # built without a compiler: no warning


def test_a_backend_that_is_named_runs_or_raises(monkeypatch):
    x, w, y = torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1, dtype=torch.int64)
    monkeypatch.delenv("FASTMARGIN_BACKEND", raising=False)
    silent = "native" if "native" in IMPLS else "stream"
    assert pick(IMPLS, x) == silent
    for name in IMPLS.keys() - {"triton"}:  # triton needs a GPU or its interpreter: test_triton.py
        monkeypatch.setenv("FASTMARGIN_BACKEND", name)
        assert pick(IMPLS, x) == name
        assert pick(IMPLS, x, "stream") == "stream"
    monkeypatch.setenv("FASTMARGIN_BACKEND", "")
    assert pick(IMPLS, x) == silent
    monkeypatch.setenv("FASTMARGIN_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"unknown backend 'abacus': want one of .*stream, reference"):
        nontarget_lse(x, w, y)
    nontarget_lse(x, w, y, backend="stream")
    if "native" in IMPLS:
        with pytest.raises(ValueError, match=r"backend 'native' cannot run torch.float16 on cpu"):
            pick(IMPLS, x.half(), "native")


ON_CAPABILITY = """
import json, torch
from fastmargin.ops.backends import BUILD
from fastmargin.ops.nontarget_lse import nontarget_lse
torch.manual_seed(0)
f, w, y = 5 * torch.randn(37, 45), torch.randn(1009, 45), torch.randint(0, 1009, (37,))

def run(backend, dtype):
    x, b = (t.to(dtype).clone().requires_grad_() for t in (f, w))
    rest, target, values, classes = nontarget_lse(x, b, y, topk=4, backend=backend)
    (rest - target).sum().backward()
    return [t.detach().double() for t in (rest, target, values, classes, x.grad, b.grad)]

truth, plain, ours = run("reference", torch.float64), run("reference", torch.float32), run("native", torch.float32)
errors = [[((a - t).abs().max() / t.abs().max()).item() for t, a in zip(truth, r)] for r in (ours, plain)]
print(json.dumps([BUILD.facts["cpu"], *errors]))
"""


@pytest.mark.skipif("native" not in IMPLS, reason="native kernels not built")
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one set of kernels on this architecture")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_kernels_of_every_capability_agree_with_the_reference(capability):
    if BUILD.facts["cpu"] == "DEFAULT" and capability == "avx2":
        pytest.skip("this machine has no AVX2")
    (cpu, ours, plain), _ = python(ON_CAPABILITY, ATEN_CPU_CAPABILITY=capability)
    assert cpu == capability.upper()
    for mine, reference in zip(ours, plain, strict=True):
        assert mine <= 2 * reference + 8 * torch.finfo(torch.float32).eps
