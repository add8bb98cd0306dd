"""Checkpoints among links, pipes, damage and saves cut short: what is committed stays, and the next save goes on."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checkpoint import STAGES, assert_is, killed, saved, state, tensors

from fastmargin.checkpoint import Sharded, load, load_latest, pack, save, store, unpack
from fastmargin.checkpoint.store import MANIFEST, seal
from fastmargin.checkpoint.tensors import TENSORS
from fastmargin.files import locked


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"lock"}


# ---------------------------------------------------------------------------------------------- things in the way


def test_the_lock_is_no_link_and_no_pipe(tmp_path: Path) -> None:
    run, precious = tmp_path / "run", tmp_path / "precious.txt"
    run.mkdir()
    precious.write_text("precious")
    (run / "lock").symlink_to(precious)
    with pytest.raises(ValueError, match="lock: is a symbolic link"):
        saved(run, 1)
    assert precious.read_text() == "precious"
    (run / "lock").unlink()
    os.mkfifo(run / "lock")
    with pytest.raises(ValueError, match="lock: is no regular file"), locked(run):
        pass


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def a_broken_link(path: Path) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.with_name("nowhere"))


def a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("no folder")


@pytest.mark.parametrize("turned_into", [a_link, a_broken_link, a_file])
def test_what_is_no_folder_is_removed_when_its_time_comes(tmp_path: Path, turned_into: Callable[[Path], None]) -> None:
    saved(tmp_path, 1, 2)
    turned_into(tmp_path / "step-00000002")
    os.mkfifo(tmp_path / "step-00000002.stale.tmp")
    assert_is(load_latest(saved(tmp_path, 3)), 3)
    assert names(tmp_path) - {"elsewhere"} == {f"step-0000000{step}" for step in (1, 2, 3)}
    saved(tmp_path, 4)
    assert names(tmp_path) - {"elsewhere"} == {"step-00000003", "step-00000004"}
    if turned_into is a_link:
        assert (tmp_path / "elsewhere" / MANIFEST).exists(), "what a link leads to is not ours"


@pytest.mark.parametrize("turned_into", [a_link, a_broken_link, a_file])
def test_a_step_is_saved_over_what_is_no_folder(tmp_path: Path, turned_into: Callable[[Path], None]) -> None:
    turned_into(saved(tmp_path, 1, 2) / "step-00000002")
    assert_is(load_latest(saved(tmp_path, 2)), 2)
    assert names(tmp_path) - {"elsewhere"} == {"step-00000001", "step-00000002"}


def test_what_cannot_be_removed_does_not_undo_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2)

    def rmtree(path: Path) -> None:
        raise PermissionError(f"not {path}")

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.warns(UserWarning, match="step-00000001 was not removed: not"):
        save(tmp_path, 3, tensors(3), state(3))
    assert_is(load_latest(tmp_path), 3)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    (tmp_path / "lock").chmod(0o666)
    tmp_path.chmod(0o555)
    read, write = os.pipe()
    child = os.fork()  # root may write anywhere: it becomes another user
    if not child:
        said = "nothing"
        try:
            os.chdir(tmp_path)
            if os.getuid() == 0:
                os.setuid(65534)
            save(".", 2, tensors(2), state(2))
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.waitpid(child, 0)
    tmp_path.chmod(0o755)
    said = os.read(read, 1000).decode()
    os.close(read), os.close(write)
    assert said.startswith("PermissionError") and ".tmp" in said, said
    assert_is(load_latest(tmp_path), 1)


@pytest.mark.parametrize("name", [MANIFEST, TENSORS])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path, 1, 2) / "step-00000002" / name
    file.unlink()
    os.mkfifo(file)
    latest = load_latest(tmp_path)
    assert_is(latest, 1)
    assert latest is not None and f"{file}: missing, or no regular file" in latest.warnings[0]


@pytest.mark.parametrize("error", [IndexError, MemoryError, OverflowError])
def test_a_candidate_that_fails_in_any_way_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    saved(tmp_path, 1, 2)

    def seal_of_one(body: dict[str, object], original: Callable[..., bytes] = seal) -> bytes:
        if body["step"] == 2:
            raise error("strange")
        return original(body)

    monkeypatch.setattr(store, "seal", seal_of_one)
    latest = load_latest(tmp_path)
    assert_is(latest, 1)
    assert latest is not None and "strange" in latest.warnings[0]


# ---------------------------------------------------------------------------------------------- kept and half-finished


def test_a_damaged_one_is_not_counted_among_those_kept(tmp_path: Path) -> None:
    saved(tmp_path, 0, 1, 2)
    (tmp_path / "step-00000002" / TENSORS).unlink()
    saved(tmp_path, 3)
    assert names(tmp_path) == {f"step-0000000{step}" for step in (1, 2, 3)}
    (tmp_path / "step-00000003" / TENSORS).unlink()
    assert_is(load_latest(tmp_path), 1)
    assert names(saved(tmp_path, 4, 5)) == {"step-00000004", "step-00000005"}


@pytest.mark.parametrize("stage", [*STAGES, "remove"])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_a_step_is_saved_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, moment: str
) -> None:
    """Of the only checkpoint: afterward it is the old one or the new one, for a kill at every call of every stage."""
    for fatal_call in range(1, 4):
        folder = saved(tmp_path / f"{fatal_call}", 1)
        with killed(monkeypatch, stage, fatal_call, moment):
            save(folder, 1, tensors(1), {"again": True})
        latest = load_latest(folder)
        assert latest is not None and latest.step == 1 and latest.warnings == []
        assert latest.state in (state(1), {"again": True})
        kept = latest.state
        saved(folder, 2)
        assert names(folder) == {"step-00000001", "step-00000002"} and load(folder / "step-00000001").state == kept


def test_two_saves_of_a_step_where_nothing_can_be_locked_never_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have begun; the first writes its tensors just when the second is about to hash its own."""
    write, digest = store.write_tensors, store.sha256

    def first_writes(file: Path, held: dict[str, torch.Tensor]) -> None:
        def second_hashes(theirs: Path) -> str:
            with contextlib.suppress(OSError):
                write(file, held)
            return digest(theirs)

        with monkeypatch.context() as patch:
            patch.setattr(store, "write_tensors", write)
            patch.setattr(store, "sha256", second_hashes)
            patch.setattr(store, "locked", lambda folder: contextlib.nullcontext())
            save(tmp_path, 1, tensors(2), state(2))
        write(file, held)

    monkeypatch.setattr(store, "write_tensors", first_writes)
    with pytest.raises(OSError, match="was not written"):
        save(tmp_path, 1, tensors(1), state(1))
    latest = load_latest(tmp_path)
    assert latest is not None and latest.state == state(2) and torch.equal(latest.tensors["w"], tensors(2)["w"])


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{handle}").removeprefix(f"{tmp_path}"))
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        done.append(f"{self.name} -> {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = tmp_path / "run" / "checkpoints"
    save(folder, 1, tensors(1), state(1))
    fresh = done[2].split("/")[3]
    at = f"/run/checkpoints/{fresh}"
    assert done == [
        "", "/run",  # whose entries of new folders are fsynced
        f"{at}/{TENSORS}", f"{at}/{MANIFEST}", at, f"{fresh} -> step-00000001", "/run/checkpoints",
    ]  # fmt: skip
    assert fresh.startswith("step-00000001.") and fresh.endswith(".tmp")
    done.clear()
    save(folder, 1, tensors(1), state(1))
    assert done[0].split("/")[3] != fresh, "a name of its own"
    assert next(line for line in done if "->" in line) == "step-00000001 -> step-00000001.old"


# ---------------------------------------------------------------------------------------------- what is in them


def test_rows_that_nobody_has_are_missed_and_none_of_none_are_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows has no rows on any rank"):
        save(tmp_path, 1, {"rows": Sharded(torch.empty(0, 3), 0, 7)}, {})
    save(tmp_path, 1, {"rows": Sharded(torch.empty(0, 3), 0, 0)}, {})
    latest = load_latest(tmp_path, verify="all")
    assert latest is not None and latest.tensors["rows"].shape == (0, 3)


class Has:
    """An object with this state_dict."""

    def __init__(self, state: object) -> None:
        self.state = state

    def state_dict(self) -> object:
        return self.state

    def load_state_dict(self, state: object) -> None:
        self.state = state


@pytest.mark.parametrize(
    "clash", [{"x/y": torch.ones(1), "x": {"y": torch.zeros(1)}}, {1: torch.ones(1), "1": torch.ones(1)}]
)
def test_names_that_meet_are_refused(clash: object) -> None:
    with pytest.raises(ValueError, match=r"part/(x/y|1) is the name of two tensors"):
        pack({"part": Has(clash)})


def test_numbers_that_are_not_finite_come_back(tmp_path: Path) -> None:
    given = {"best": float("inf"), "worst": [-float("inf"), 1.5], "nan": float("nan")}
    save(tmp_path, 1, *pack({"part": Has(given)}))
    found = Has(None)
    latest = load_latest(tmp_path)
    assert latest is not None
    unpack(latest, {"part": found})
    assert repr(found.state) == repr(given)
    assert json.loads((latest.path / MANIFEST).read_text())["body"]["state"], "JSON, to the letter"


def test_tied_weights_come_back(tmp_path: Path) -> None:
    def tied() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    model, again = tied(), tied()
    both = torch.ones(4, 3)
    tensors, state = pack({"model": model})
    save(tmp_path, 1, tensors | {"both": both, "half": both[2:]}, state)
    latest = load_latest(tmp_path)
    assert latest is not None
    unpack(latest, {"model": again})
    assert again[1].weight is again[0].weight and torch.equal(again[0].weight, model[0].weight)
    assert torch.equal(latest.tensors["half"], both[2:])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="maps are read from Linux's /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    def mapped() -> list[str]:
        return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}" in line]

    part = torch.nn.Linear(300, 300)
    save(tmp_path, 1, *pack({"part": part}))
    latest = load_latest(tmp_path)
    assert latest is not None and not mapped()
    unpack(latest, {"part": part})
    assert not mapped()
    assert latest.tensors["part/weight"].shape == (300, 300), "opened again"
    assert mapped()
    latest.tensors.close()
    assert not mapped()
