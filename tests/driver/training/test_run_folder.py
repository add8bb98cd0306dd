"""The folder of a run and the small files in it."""

from pathlib import Path

import pytest
from small_run import SMALL, small_data  # noqa: F401 (a fixture, too)

from fastmargin.driver.commands import train
from fastmargin.driver.training import run_folder
from fastmargin.files import locked

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_record_torn_by_a_kill_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        run_folder.append_record(tmp_path, {"step": step, "loss": 1.0})
    assert len((tmp_path / run_folder.RECORDS).read_bytes().splitlines()) == 2, "a line each, and no empty ones"
    with (tmp_path / run_folder.RECORDS).open("a") as file:
        file.write('{"step": 3, "lo')
    for step in (2, 3):
        run_folder.append_record(tmp_path, {"step": step, "loss": 2.0})
    assert run_folder.read_records(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 2.0},
    ]


def test_dated_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = [run_folder.claim(None, SMALL) for _ in range(4)]
    assert len(set(folders)) == 4 and all(path.parent.name == "runs" for path in folders)
    assert all(run_folder.read_config(path) == SMALL for path in folders)


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    where = run_folder.claim(str(tmp_path), SMALL)
    with locked(where), pytest.raises(BlockingIOError, match="is in use by another run, process"):
        train.train(SMALL, str(tmp_path), print)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("cell", ["\t-7", "\r12", "-7\n", "=7", "+1 2"])
def test_a_number_with_space_around_it_is_no_number(cell: str) -> None:
    assert run_folder.inert(cell) == f"'{cell}"
    assert run_folder.inert("-7.5e3") == "-7.5e3" and run_folder.inert(" 12") == " 12"
