"""The command line: its messages for a user's mistakes, and what it never imports."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from emulation import ROOT
from jsonargparse import ArgumentParser

from fastmargin.driver.commands import cli, train
from fastmargin.driver.commands.parser import Parser
from fastmargin.driver.config import DataConfig, HeadConfig, OptimConfig, SamplerConfig, TrainConfig, settled
from fastmargin.driver.training import run_folder


def spawn(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--print_config"], *([command, "--help"] for command in cli.COMMANDS)],
)
def test_help_does_not_import_torch(tmp_path: Path, arguments: list[str]) -> None:
    done = spawn("-X", "importtime", "-m", "fastmargin", *arguments, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout
    imported = {line.rsplit("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "jsonargparse" in imported, "the list of imports was read"
    assert not imported & {"torch", "matplotlib", "PIL", "safetensors"}


def test_help_names_every_option_with_its_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for name, _, _, text in cli.options(TrainConfig):
        assert f"--{name}" in said and text in said
    assert said.count("FASTMARGIN_TRAIN__OPTIM__LR") == said.count("FASTMARGIN") == 1, "the environment once"
    assert not any(word in said for word in ("Literal", "Union", "ARG:", "ENV:", "int |"))
    assert "(type: bf16, fp16 or null, default: null)" in said


@pytest.mark.parametrize(("text", "want"), [("0.25", 0.25), ("1", 1.0), ("1.0", 1.0), ("2", 2), ("9", 9), ("9.0", 9)])
def test_random_classes_are_a_share_or_a_number(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, want: float
) -> None:
    """1 is a share however it is written, also when it is read back from the config of a run."""
    calls = []
    monkeypatch.setattr(train, "train", lambda *arguments: calls.append(arguments[0]))
    assert cli.main(["train", "--sampler.random_classes", text]) == 0
    run_folder.claim(str(tmp_path), calls[0])
    for config in (
        calls[0],
        run_folder.read_config(tmp_path),
        TrainConfig(sampler=SamplerConfig(random_classes=want)),
    ):
        drawn = config.sampler.share_or_number()
        assert drawn == want and isinstance(drawn, float) == (want <= 1)


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = spawn("-m", "fastmargin", "train", "--optim.nope", "3", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "fastmargin: unrecognized arguments: --optim.nope 3\n"
    assert list(tmp_path.iterdir()) == []


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    assert cli.main(arguments) == cli.MISTAKE
    said = capsys.readouterr().err
    assert said.startswith("fastmargin: ") and said.count("\n") == 1 and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["train", "evaluate", "export"]),
        (["grow"], ["grow"]),
        (["train", "--optim.steps", "many"], ["optim.steps", "many"]),
        (["train", "--optim.steps", "-1"], ["optim.steps is -1", "at least 1"]),
        (["train", "--optim.lr", "-1"], ["optim.lr is -1.0"]),
        (["train", "--optim.lr", ".nan"], ["optim.lr is nan"]),
        (["train", "--optim.lr", ".inf"], ["optim.lr is inf"]),
        (["train", "--data.holdout", "1"], ["data.holdout is 1.0", "between 0 and 1"]),
        (["train", "--data.size", "8"], ["data.size is 8", "at least 16"]),
        (["train", "--data.color", "blue"], ["data.color", "blue", "gray"]),
        (["train", "--data.color", "rgb"], ["data.color is 'rgb'", "gray"]),
        (["train", "--data.augment", "true"], ["data.augment", "glyphs"]),
        (["train", "--data.workers", "-1"], ["data.workers is -1"]),
        (["train", "--data.source", "synthetic:3x2", "--data.fonts", "x"], ["data.fonts is 'x'", "glyphs alone"]),
        (["train", "--data.source", "absent"], ["data.source is 'absent'", "no such file or folder"]),
        (["train", "--head.margin", "Cosine"], ["head.margin", "Cosine", "ArcFace"]),
        (["train", "--head.topk", "0"], ["head.topk is 0"]),
        (["train", "--model.name", "resnet50"], ["model.name", "resnet50", "iresnet50"]),
        (["train", "--model.name", "os:system"], ["model.name", "os:system", "iresnet50"]),
        (["train", "--model.output", "F"], ["model.output", "F"]),
        (["train", "--sampler.counts", "[8, 2]"], ["sampler.counts is (8, 2)"]),
        (["train", "--sampler.random_classes", "1.5"], ["sampler.random_classes is 1.5", "whole number from 2"]),
        (["train", "--sampler.random_classes", "0"], ["sampler.random_classes is 0.0", "a share above 0"]),
        (["train", "--sampler.random_classes", ".inf"], ["sampler.random_classes is inf"]),
        (["train", "--seed", "-1"], ["seed is -1"]),
        (["train", "--config", "absent.yaml"], ["absent.yaml"]),
        (["evaluate"], ["RUN is required"]),
        (["evaluate", "absent"], ["absent: no such folder\n"]),
        (["export", "absent", "--out", "x"], ["absent: no such folder\n"]),
        (["export", "absent"], ["--out is required"]),
        (["doppelgangers"], ["RUN is required"]),
        (["doppelgangers", "absent"], ["absent: no such folder\n"]),
        (["doppelgangers", "absent", "--limit", "few"], ["limit", "few"]),
        (["embed", "absent"], ["out"]),
        (["embed", "absent", "--out", "x"], ["absent: no such folder\n"]),
        (["clean", "absent"], ["out"]),
        (["clean", "absent", "--out", "x"], ["absent: no such folder\n"]),
        (["clean", "absent", "--out", "x", "--below", "2"], ["below is 2.0", "from -1 to 1"]),
        (["clean", "absent", "--out", "x", "--above", ".nan"], ["above is nan", "from -1 to 1"]),
        (["clean", "absent", "--out", "x", "--limit", "0"], ["limit is 0", "at least 1"]),
        (["info", "more"], ["more"]),
        (["train", "--optim.precision", "fp32"], ["optim.precision is 'fp32'; want bf16, fp16 or null\n"]),
        (["train", "--head.margin", "arcface"], ["head.margin is 'arcface'; want Softmax", "MagFace or ElasticFace"]),
        (["train", "--terms.center", "0.01"], ["terms is '0.01'; want a weight and options", "center.weight 0.01"]),
        (["train", "--terms.center.wieght", "1"], ["terms: Option 'wieght' is not accepted; want a weight"]),
        (["train", "--head.s", "big"], ["head.s is 'big'; want a number or null\n"]),
        (["train", "--optim.milestones", "3"], ["optim.milestones is '3'; want [a whole number, ...]\n"]),
        (["train", "--tensorboard"], ["--tensorboard has no value; want true or false\n"]),
        (["train", "--optim.stepz", "3"], ["unrecognized arguments: --optim.stepz 3; did you mean --optim.steps?\n"]),
        (["plan", "--gpus", "4"], ["--classes is required\n"]),
    ],
)
def test_mistakes_in_options(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    said = mistake(capsys, *arguments)
    assert all(word in said for word in words)
    assert list(tmp_path.iterdir()) == [], "a mistake leaves no folder behind"


def test_unknown_key_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("optim: {stepz: 3}\n")
    said = mistake(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert said == "fastmargin: train has no option optim.stepz; did you mean optim.steps?\n"


def test_bad_value_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FASTMARGIN_TRAIN__OPTIM__STEPS", "many")
    assert "many" in mistake(capsys, "train")


def test_fonts_folder_without_fonts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty" in mistake(capsys, "train", "--data.fonts", "empty")
    assert not (tmp_path / "runs").exists()
    assert "absent" in mistake(capsys, "train", "--data.fonts", "absent")


def test_out_folder_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "not the folder of a run" in mistake(capsys, "train", "--out", str(tmp_path))
    assert "thesis.tex" in mistake(capsys, "train", "--out", str(tmp_path / "thesis.tex"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_out_folder_of_another_run_names_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = replace(TrainConfig(), seed=3, optim=OptimConfig(lr=0.2))
    run_folder.claim(str(tmp_path), theirs)
    before = (tmp_path / run_folder.CONFIG).read_bytes()
    said = mistake(capsys, "train", "--out", str(tmp_path))
    assert "optim.lr 0.2 there, 0.1 here, seed 3 there, 0 here" in said
    assert f"train --config {tmp_path / run_folder.CONFIG} --out {tmp_path}" in said
    assert (tmp_path / run_folder.CONFIG).read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_out_folder_of_a_run_on_fewer_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The number of steps follows from the number of images, so it differs with the same command line."""
    run_folder.claim(str(tmp_path), settled(TrainConfig(), 30_000))
    with pytest.raises(ValueError, match=r"optim.steps 2344 there, 2422 here; .* the number of images .* has changed"):
        run_folder.claim(str(tmp_path), settled(TrainConfig(), 31_000))
    said = mistake(capsys, "train", "--optim.steps", "9", "--out", str(tmp_path))
    assert "optim.steps 2344 there, 9 here. To resume" in said, "that was given"


def test_advice_for_train_is_for_train_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").touch()
    assert "a new or an empty folder to train in" in mistake(capsys, "train", "--out", str(tmp_path))
    said = mistake(capsys, "doppelgangers", str(tmp_path))
    assert said == f"fastmargin: {tmp_path} is not the folder of a run: it has no config.json\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"optim": 3}',
        '{"optim": null}',
        '{"head": {"margin": "ArcFac"}}',
        '{"optim": {"stepz": 3}}',
        '{"model": {"name": "antigravity:fly"}}',
        '{"dim": 0}',
    ],
)
def test_a_spoiled_config_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / run_folder.CONFIG).write_text(text)
    assert run_folder.CONFIG in mistake(capsys, "evaluate", str(tmp_path))
    assert "antigravity" not in sys.modules, "a configuration imports nothing"


def test_metrics_of_nothing_are_no_finished_run(tmp_path: Path) -> None:
    run_folder.claim(str(tmp_path), TrainConfig())
    run_folder.write_json(tmp_path / run_folder.METRICS, {})
    assert not run_folder.finished(tmp_path)


def test_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(TrainConfig(), optim=OptimConfig(steps=9))
    run_folder.claim(str(tmp_path), config)
    run_folder.write_json(tmp_path / run_folder.METRICS, {"step": 9})
    assert cli.main(["train", "--optim.steps", "9", "--out", str(tmp_path)]) == 0
    assert "finished" in capsys.readouterr().out


def test_train_gets_the_configuration_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file overrides the environment, the command line overrides a file; the rest are defaults."""
    calls = []
    monkeypatch.setattr(train, "train", lambda *arguments: calls.append(arguments[:2]))
    (tmp_path / "c.yaml").write_text("optim: {steps: 5, lr: 0.2}\nsampler: {counts: [3, 4]}\nout: elsewhere\n")
    monkeypatch.setenv("FASTMARGIN_TRAIN__OPTIM__LR", "0.3")
    monkeypatch.setenv("FASTMARGIN_TRAIN__DIM", "64")
    assert cli.main(["train", "--config", str(tmp_path / "c.yaml"), "--optim.steps", "6", "--head.s", "20"]) == 0
    expected = TrainConfig(
        head=HeadConfig(s=20.0),
        optim=OptimConfig(steps=6, lr=0.2),
        sampler=SamplerConfig(counts=(3, 4)),
        dim=64,
    )
    assert calls == [(expected, "elsewhere")]


def test_the_config_of_a_run_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    monkeypatch.setattr(train, "train", lambda *arguments: calls.append(arguments[0]))
    config = TrainConfig(data=DataConfig(faces=4), sampler=SamplerConfig("doppelganger", 0.5, (1, 3), 2), seed=7)
    where = run_folder.claim(str(tmp_path / "run"), config)
    assert json.loads((where / run_folder.CONFIG).read_bytes()) == json.loads(json.dumps(asdict(config)))
    assert cli.main(["train", "--config", str(where / run_folder.CONFIG)]) == 0
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--config", str(where / run_folder.CONFIG), "--print_config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert yaml.safe_load((tmp_path / "printed.yaml").read_text())["data"]["faces"] == 4
    assert cli.main(["train", "--config", str(tmp_path / "printed.yaml")]) == 0
    assert calls == [config, config]


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "fastmargin: interrupted\n", "no word of checkpoints that may not be there"


def test_our_own_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(train, "train", broken)
    with pytest.raises(TypeError, match="ours"):
        cli.main(["train"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["plan", "--sample-rate", "0.1"], "--sample_rate"),
        (["plan", "--in-backward=false"], "--in_backward"),
        (["plan", "--compute-dtype", "bf16"], "--compute_dtype"),
        (["plan", "--backbone-gb", "3"], "--backbone_gb"),
        (["train", "--head.sample-rate", "0.1"], "--head.sample_rate"),
        (["train", "--log-every", "5"], "--log_every"),
    ],
)
def test_options_have_underscores(capsys: pytest.CaptureFixture[str], given: list[str], meant: str) -> None:
    arguments = [*given, *(["--classes", "1e6"] if given[0] == "plan" else [])]
    said = mistake(capsys, *arguments)
    assert said == f"fastmargin: unrecognized arguments: {' '.join(given[1:])}; did you mean {meant}?\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "--classes", "1e6", "--compute_dtype", "bfloat16"], "is 'bfloat16'; want bf16, fp16, fp32 or null"),
        (["train", "--head.compute_dtype", "bfloat16"], "is 'bfloat16'; want bf16, fp16 or null"),
        (["train", "--optim.precision", "float16"], "is 'float16'; want bf16, fp16 or null"),
    ],
)
def test_types_have_short_names(capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert words in mistake(capsys, *arguments)


def test_plan_takes_train_s_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--classes", "1e6", "--sample_rate", "0.1", "--compute_dtype", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "bf16 products" in said and "0.1 of the classes" in said


# Messages of a jsonargparse whose wording is not known


@pytest.mark.parametrize(
    "message",
    [
        "",
        "Unrecognized arguments: --optim.stepz 3",  # jsonargparse 4.47
        "Option 'train.out' is required but not provided or its value is None.",  # jsonargparse 4.47
        "Validation failed: Subcommand 'train' does not accept nested key 'optim.stepz'",  # jsonargparse 4.40
        "Subcommand 'grow' does not accept option 'optim.steps'",
        "Subcommand 'train' does not accept option",
        'Parser key "absent": Got value: 3',
        'Parser key "":',
        "argument --absent: expected one argument",
        "argument train: expected one argument",
        "the following arguments are required: classes",
        "the following arguments are required: --classes, plan.gpus",
    ],
)
@pytest.mark.parametrize("build", [cli.build_parser, cli.train_parser])
def test_an_unknown_message_stays_as_it_is(build: Callable[[], Parser], message: str) -> None:
    assert build().reworded(message) == message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--optim.steps", "many"], "many"),
        (["train", "--optim.stepz", "3"], "--optim.stepz 3"),
        (["train", "--tensorboard"], "--tensorboard"),
        (["train", "--terms.center.wieght", "1"], "wieght"),
        (["train", "--config", "c.yaml"], "optim.stepz"),
        (["plan", "--gpus", "4"], "classes"),
        (["evaluate"], "run"),
        (["grow"], "grow"),
        ([], "train"),
    ],
)
def test_a_newer_jsonargparse_speaks_in_its_own_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("optim: {stepz: 3}\n")
    ours, theirs = Parser.reworded, ArgumentParser.error
    monkeypatch.setattr(Parser, "reworded", lambda self, message: ours(self, f"Mistake: {message}"))
    monkeypatch.setattr(ArgumentParser, "error", lambda self, message, ex=None: theirs(self, f"Error. {message}", ex))
    said = mistake(capsys, *arguments)
    assert said.startswith("fastmargin: Error. Mistake: ") and words in said and "; want" not in said


def test_without_the_extras_it_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['jsonargparse'] = None; from fastmargin.__main__ import main; sys.exit(main())"
    done = spawn("-c", code, cwd=tmp_path)
    assert done.returncode == 2 and "fastmargin[train]" in done.stderr and done.stderr.count("\n") == 1


def test_any_name_can_be_printed(capsys: pytest.CaptureFixture[str]) -> None:
    cli.log("一 " + os.fsdecode(b"\xff.png"))
    assert capsys.readouterr().out == "一 \\udcff.png\n"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    assert "fastmargin" in said and "torch" in said and "native" in said and "stream" in said
