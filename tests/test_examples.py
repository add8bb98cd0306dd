"""The example of every command's help, run in their order, and the loop of the README."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from emulation import ROOT

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


def test_the_loop_of_the_readme_infers_in_evaluation_mode() -> None:
    """Its first block, with a small network and 20 classes."""
    block = re.search(r"## In your own loop\n+```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    code = block[1].replace('"iresnet50", 512, 112', '"iresnet18", 512, 16').replace("1_000_000", "20")
    images = torch.randn(4, 3, 16, 16)
    names = {"loader": [(images, torch.arange(4))] * 2, "queries": images}
    exec(code, names)
    alone = names["backbone"](images[:1])
    assert not names["scores"].requires_grad and names["classes"].shape == (4, 5)
    scores, _ = names["head"].nearest(alone, k=5)
    assert (scores - names["scores"][:1]).abs().max() < 1e-5, "rows of a batch do not see each other"
