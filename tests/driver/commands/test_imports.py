"""No text from an option, a file, the environment or the folder of a run imports a module."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import SMALL

from fastmargin.driver.commands import cli, train

NAME = "planted_package.module.T"
TERMS = [
    {"center": NAME},
    {"center": {"class_path": NAME}},
    {"center": {"class_path": NAME, "init_args": {"weight": 1}}},
    {"center": {"options": {"class_path": NAME}}},
    {"center": {"options": {"update": {"class_path": NAME, "init_args": {}}}}},
    {NAME: {"weight": 1}},
    {"class_path": NAME, "init_args": {}},
    NAME,
]
RUNS: list[dict[str, Any]] = [
    *({"terms": terms} for terms in TERMS),
    {"model": {"name": "planted_package.module:T"}},
    {"model": {"class_path": NAME}},
    {"head": {"margin": NAME}},
    {"class_path": NAME, "init_args": {}},
]


@pytest.fixture(autouse=True)
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """A module that leaves a file where it is imported, and whether it was."""
    package, mark = tmp_path / "site" / "planted_package", tmp_path / "imported"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "module.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass T: pass\n")
    monkeypatch.syspath_prepend(str(package.parent))
    for name in [name for name in sys.modules if name.startswith("planted_package")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    return mark.exists


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    tiny = ["--data.source", "synthetic:40x2", "--data.size", "16", "--optim.steps", "1", "--out", "run"]
    code = cli.main(["train", *tiny, *arguments])
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1
    return said


@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_terms_as_an_option_or_in_the_environment(
    terms: object, planted: Callable[[], bool], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(["--terms", json.dumps(terms)], capsys)
    assert not planted()
    monkeypatch.setenv("FASTMARGIN_TRAIN__TERMS", json.dumps(terms))
    refused([], capsys)
    assert not planted()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--terms.center", NAME],
        ["--terms.center.class_path", NAME],
        ["--terms.center.options", f"{{class_path: {NAME}}}"],
        ["--terms.center.options.update", NAME],
        ["--model.name", "planted_package.module:T"],
        ["--head.margin", NAME],
        ["--init_from", NAME],
        ["--data.source", NAME],
    ],
)
def test_options(arguments: list[str], planted: Callable[[], bool], capsys: pytest.CaptureFixture[str]) -> None:
    refused(arguments, capsys)
    assert not planted()


def test_the_help_of_a_class(planted: Callable[[], bool]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--terms.help", NAME])
    assert not planted()


@pytest.mark.parametrize("content", RUNS, ids=str)
@pytest.mark.parametrize(("suffix", "dump"), [("json", json.dumps), ("yaml", yaml.safe_dump)])
def test_a_file(
    content: dict[str, Any],
    suffix: str,
    dump: Callable[[object], str],
    tmp_path: Path,
    planted: Callable[[], bool],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / f"strange.{suffix}"
    file.write_text(dump(content))
    refused(["--config", str(file)], capsys)
    assert not planted()


def test_a_tag_of_yaml(tmp_path: Path, planted: Callable[[], bool], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "strange.yaml").write_text(f"terms: {{center: !!python/name:{NAME} }}\n")
    refused(["--config", "strange.yaml"], capsys)
    assert not planted()


@pytest.mark.parametrize("content", RUNS, ids=str)
def test_the_folder_of_a_run(
    content: dict[str, Any], tmp_path: Path, planted: Callable[[], bool], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "strange"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({**asdict(SMALL), **content}))
    for command in (
        ["evaluate", "strange"],
        ["embed", "strange", "--out", "x.safetensors"],
        ["export", "strange", "--out", "exported"],
        ["clean", "strange", "--out", "cleaned"],
        ["doppelgangers", "strange"],
    ):
        assert cli.main(command) == 2 and capsys.readouterr().err.count("\n") == 1, command
    refused(["--init_from", "strange"], capsys)
    refused(["--config", "strange/config.json"], capsys)
    assert not planted()


def test_what_a_term_was_given_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    want = f"terms is '{NAME}'; want a weight and options by name, as in --terms.center.weight 0.01\n"
    assert refused(["--terms.center", NAME], capsys).endswith(want)


def test_good_terms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(train, "train", lambda config, *_: calls.append(config))
    (tmp_path / "good.yaml").write_text("terms: {git: {weight: 2, options: {pairs: samples}}}\n")
    given = ["--config", "good.yaml", "--terms.center.weight", "0.01", "--terms.git.weight", "3"]
    assert cli.main(["train", *given]) == 0
    terms = asdict(calls[0])["terms"]
    assert terms["git"] == {"weight": 3.0, "options": {"pairs": "samples"}}
    assert terms["center"] == {"weight": 0.01, "options": {}}
