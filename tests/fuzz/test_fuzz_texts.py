"""Random spellings of the name of a module, at random places of a configuration: none is imported, each is an error."""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import SMALL

from fastmargin.driver.commands import cli

MODULE = "planted_by_fuzz"
NAMES = [
    f"{MODULE}{rest}" for rest in ("", ".module", ".module.T", ".module:T", ".module.T.U", ".absent", "/module.py:T")
]
IMPORTABLE = f"{MODULE}.module.T"
OPTIONS = (
    "model.name model.output model.dropout head.margin head.backend head.m head.topk optim.name optim.schedule "
    "optim.lr optim.milestones optim.betas optim.nesterov optim.precision sampler.name sampler.counts init_from dim "
    "seed data.source data.size data.color data.augment data.holdout terms"
).split()
TERMS = ("center", "git", "minimum_margin", "marginal", "range", "margin_based")
BELOW_A_TERM = ("weight", "options", "class_path", "init_args", "options.update", "options.class_path", "options.x")
TAGS = ("name", "module", "object", "object/new", "object/apply")
TINY = ["--data.source", "synthetic:40x2", "--data.size", "16", "--optim.steps", "1", "--out", "run"]


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A package that leaves a file where any part of it is imported, and whether it was."""
    package, mark = tmp_path / "site" / MODULE, tmp_path / "imported"
    package.mkdir(parents=True)
    for file in ("__init__.py", "module.py"):
        (package / file).write_text(f"open({str(mark)!r}, 'w').close()\nclass T: pass\n")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.startswith(MODULE)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    return mark.exists


# ---- generators: rng -> arguments of the command line; files and the environment are written on the way


def value(rng: random.Random, depth: int = 0) -> Any:
    """The name in any of the shapes that a parser could take for an object to build."""
    name = rng.choice([IMPORTABLE, rng.choice(NAMES)])
    if depth == 3 or rng.random() < 0.3:
        return name
    inner = value(rng, depth + 1)
    return rng.choice([
        {"class_path": IMPORTABLE},
        {"class_path": IMPORTABLE, "init_args": {}},
        {"class_path": name},
        {"class_path": name, "init_args": {"weight": inner}},
        {"class_path": inner},
        {"options": inner},
        {"weight": 1, "options": {"update": inner}},
        {"weight": inner},
        {name: inner},
        [inner],
    ])  # fmt: skip


def terms(rng: random.Random) -> Any:
    """Often an object that could be built, straight below a term."""
    built = {"class_path": IMPORTABLE, **rng.choice([{}, {"init_args": {}}, {"dict_kwargs": {}}])}
    given = rng.choice([built, {"options": built}, {"options": {"x": built}}, value(rng)])
    return rng.choice([value(rng), {rng.choice(TERMS): given}, {"git": {"weight": 1}, rng.choice(TERMS): given}])


def text(rng: random.Random, content: Any) -> str:
    """As an option, a file or a variable would have it."""
    return content if isinstance(content, str) else rng.choice([json.dumps, yaml.safe_dump, flow])(content)


def flow(content: Any) -> str:
    return yaml.safe_dump(content, default_flow_style=True, width=1000).strip()


def whole(rng: random.Random) -> Any:
    """The content of a configuration file."""
    group, _, key = rng.choice([name for name in OPTIONS if "." in name]).partition(".")
    return rng.choice([*[{"terms": terms(rng)}] * 3, {group: {key: value(rng)}}, {group: value(rng)}, value(rng)])


def tagged(rng: random.Random) -> str:
    return (
        f"terms: {{{rng.choice(TERMS)}: !!python/{rng.choice(TAGS)}:{rng.choice(NAMES)} {rng.choice(['', '[]'])} }}\n"
    )


def as_option(rng: random.Random, _: pytest.MonkeyPatch) -> list[str]:
    name = rng.choice(OPTIONS)
    return ["train", *TINY, f"--{name}", text(rng, terms(rng) if name == "terms" else value(rng))]


def as_term(rng: random.Random, _: pytest.MonkeyPatch) -> list[str]:
    name = rng.choice(["", rng.choice([f".{below}" for below in BELOW_A_TERM])])
    given = rng.choice([IMPORTABLE, {"class_path": IMPORTABLE}, value(rng)])
    return ["train", *TINY, f"--terms.{rng.choice([*TERMS, MODULE])}{name}", text(rng, given)]


def in_a_file(rng: random.Random, _: pytest.MonkeyPatch) -> list[str]:
    content = tagged(rng) if rng.random() < 0.2 else text(rng, whole(rng))
    Path("strange").with_suffix(suffix := rng.choice([".json", ".yaml", ".yml", ".txt"])).write_text(content)
    return ["train", *TINY, "--config", f"strange{suffix}"]


def in_the_environment(rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    name = rng.choice(["terms", "terms", rng.choice(OPTIONS)])
    given = text(rng, terms(rng) if name == "terms" else value(rng))
    monkeypatch.setenv(f"FASTMARGIN_TRAIN__{name.upper().replace('.', '__')}", given)
    return ["train", *(TINY[2:] if name.startswith("data.source") else TINY[:2] if name.startswith("data") else TINY)]


def in_a_run(rng: random.Random, _: pytest.MonkeyPatch) -> list[str]:
    Path("strange/checkpoints").mkdir(parents=True)
    group = rng.choice(["terms", "model", "head", "class_path", MODULE])
    Path("strange/config.json").write_text(json.dumps({**asdict(SMALL), group: value(rng)}))
    return rng.choice(COMMANDS)("strange")


def as_a_run(rng: random.Random, _: pytest.MonkeyPatch) -> list[str]:
    return rng.choice(COMMANDS)(rng.choice(NAMES))


COMMANDS: list[Callable[[str], list[str]]] = [
    lambda run: ["evaluate", run],
    lambda run: ["embed", run, "--out", "x.safetensors"],
    lambda run: ["export", run, "--out", "exported"],
    lambda run: ["clean", run, "--out", "cleaned"],
    lambda run: ["doppelgangers", run],
    lambda run: ["train", *TINY, "--init_from", run],
]
PLACES = (as_option, as_term, as_term, in_a_file, in_a_file, in_the_environment, in_a_run, as_a_run)


@pytest.mark.parametrize("seed", range(56))
def test_texts_that_name_a_module(
    rng: random.Random,
    planted: Callable[[], bool],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    arguments = PLACES[seed % len(PLACES)](rng, monkeypatch)
    code = cli.main(arguments)
    said = capsys.readouterr().err
    assert not planted() and not any(name.startswith(MODULE) for name in sys.modules), arguments
    assert code == 2 and said.startswith("fastmargin") and "Traceback" not in said, (arguments, said)
