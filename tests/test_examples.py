"""The example of every command's help, run in their order."""

import shlex
from pathlib import Path

import pytest

from fastmargin.driver.commands import cli

pytestmark = pytest.mark.usefixtures("one_thread")


def example(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    program, *arguments = shlex.split(capsys.readouterr().out.rpartition("Example: ")[2])
    assert (program, arguments[0]) == ("fastmargin", command)
    return arguments


def test_the_example_of_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in cli.COMMANDS:
        assert cli.main(example(command, capsys)) == 0, command
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    assert {
        "run/metrics.json",
        "embedded.safetensors",
        "exported/backbone.safetensors",
        "look-alikes/doppelgangers.csv",
        "cleaning/images.csv",
        "cleaning/pairs.csv",
        "cleaning/overlap.csv",
        "cleaning/remove.txt",
    } <= files
    assert cli.main(["evaluate", "embedded.safetensors"]) == 0
    assert "10 identities, 40 images" in capsys.readouterr().out
