"""Checkpoints: what is loaded is what was saved, or the one before it, never a mixture and never damage."""

import contextlib
import errno
import fcntl
import io
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastmargin import checkpoint
from fastmargin.checkpoint import load, load_latest, save, store
from fastmargin.checkpoint.store import MANIFEST, committed, seal, step_of
from fastmargin.checkpoint.tensors import TENSORS
from fastmargin.files import locked, sha256

STAGES = ("write_tensors", "sha256", "seal", "rename", "prune")


def tensors(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "w": torch.randn(7, 5, generator=generator),
        "channels_last": torch.randn(2, 3, 4, 4, generator=generator).to(memory_format=torch.channels_last),
        "count": torch.tensor(step),
        "empty": torch.empty(0, 3),
    }


def state(step: int) -> dict[str, object]:
    return {"config": {"lr": 0.1 * step, "name": "ä"}, "none": None, "list": [1, 2]}


def assert_is(latest: checkpoint.Checkpoint | None, step: int) -> None:
    assert latest is not None and latest.step == step
    assert latest.state == state(step)
    assert latest.tensors.keys() == tensors(step).keys()
    for name, tensor in tensors(step).items():
        torch.testing.assert_close(latest.tensors[name], tensor, rtol=0, atol=0)


def saved(folder: Path, *steps: int) -> Path:
    for step in steps:
        save(folder, step, tensors(step), state(step))
    return folder


def flip(file: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1 << bit
    file.write_bytes(data)


def test_load_returns_what_was_saved(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None
    latest = load_latest(saved(tmp_path, 400))
    assert_is(latest, 400)
    assert latest is not None and latest.warnings == []


def test_two_newest_are_kept_in_numerical_order(tmp_path: Path) -> None:
    saved(tmp_path, 1, 99_999_999, 100_000_000)
    assert [path.name for path in committed(tmp_path)] == ["step-99999999", "step-100000000"]
    assert_is(load_latest(tmp_path), 100_000_000)


@contextlib.contextmanager
def killed(monkeypatch: pytest.MonkeyPatch, stage: str, fatal: int, moment: str) -> Iterator[Iterator[int]]:
    """A save in its body dies before or after the `fatal`-th call of a stage; yields the counter of the calls."""
    original, calls = getattr(store, stage), iter(range(1, 100))

    def dying(*args: object) -> object:
        call = next(calls)
        if call == fatal and moment == "before":
            raise KeyboardInterrupt
        result = original(*args)
        if call == fatal:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(store, stage, dying)
        yield calls


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_between_any_two_stages_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, moment: str
) -> None:
    """Fails at every call of every stage in turn; afterward there is exactly step 1 or step 2."""
    for fatal_call in range(1, 5):
        folder = saved(tmp_path / f"{fatal_call}", 0, 1)
        with killed(monkeypatch, stage, fatal_call, moment) as calls:
            save(folder, 2, tensors(2), state(2))
            assert next(calls) <= fatal_call, "the fatal call was made, and survived"
        latest = load_latest(folder)
        assert latest is not None and latest.warnings == []
        assert_is(latest, 2 if (folder / "step-00000002").exists() else 1)
        assert_is(load_latest(saved(folder, 3)), 3)
        assert not list(folder.glob("*.tmp"))
        assert len(committed(folder)) == 2


def test_a_kill_while_old_ones_are_removed_leaves_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, 1, 2)

    def half_removed(path: Path) -> None:
        (path / MANIFEST).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", half_removed)
        save(tmp_path, 3, tensors(3), state(3))
    assert_is(load_latest(tmp_path), 3)
    saved(tmp_path, 4)
    assert [path.name for path in committed(tmp_path)] == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
def test_every_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path, 1).joinpath("step-00000001", name)
    size = file.stat().st_size
    for offset in range(0, size, max(1, size // 97)):
        flip(file, offset, offset % 8)
        with pytest.raises(ValueError, match=name):
            load(file.parent)
        flip(file, offset, offset % 8)
    assert_is(load_latest(tmp_path), 1)


@pytest.mark.parametrize("name", [TENSORS, MANIFEST])
@pytest.mark.parametrize("left", [0, 1, -1])
def test_truncation_falls_back_and_says_so(tmp_path: Path, name: str, left: int) -> None:
    file = saved(tmp_path, 1, 2).joinpath("step-00000002", name)
    file.write_bytes(file.read_bytes()[:left])
    latest = load_latest(tmp_path)
    assert_is(latest, 1)
    assert latest is not None and len(latest.warnings) == 1 and str(file) in latest.warnings[0]


def test_nothing_usable_is_an_error_that_names_every_file(tmp_path: Path) -> None:
    saved(tmp_path, 1, 2)
    (tmp_path / "step-00000001" / TENSORS).unlink()
    flip(tmp_path / "step-00000002" / TENSORS, -1)
    with pytest.raises(ValueError, match=r"no checkpoint .*step-00000002/tensors.*step-00000001/tensors.*missing"):
        load_latest(tmp_path)


def test_a_run_that_resumed_past_a_damaged_checkpoint_replaces_it(tmp_path: Path) -> None:
    flip(saved(tmp_path, 1, 2) / "step-00000002" / TENSORS, -1)
    assert_is(load_latest(tmp_path), 1)
    saved(tmp_path, 2)
    latest = load_latest(tmp_path)
    assert_is(latest, 2)
    assert latest is not None and latest.warnings == []
    assert len(committed(tmp_path)) == 2


@pytest.mark.parametrize("offset", [100, -1], ids=["header", "data"])
def test_retention_never_counts_what_was_refused_as_newer(tmp_path: Path, offset: int) -> None:
    """Steps 2 and 3 stay loadable beside a damaged step 9, also where only a hash would show its damage."""
    flip(saved(tmp_path, 9) / "step-00000009" / TENSORS, offset)
    saved(tmp_path, 1, 2, 3)
    assert [step_of(path) for path in committed(tmp_path)] == [2, 3, 9]
    assert_is(load_latest(tmp_path), 3)


def test_retention_never_counts_a_checkpoint_that_lacks_a_file(tmp_path: Path) -> None:
    (saved(tmp_path, 1, 2) / "step-00000002" / TENSORS).unlink()
    saved(tmp_path, 3)
    assert [step_of(path) for path in committed(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("target", ["step-00000002", f"step-00000002/{TENSORS}", f"step-00000002/{MANIFEST}"])
def test_links_are_refused(tmp_path: Path, target: str) -> None:
    path = saved(tmp_path, 1, 2) / target
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    latest = load_latest(tmp_path)
    assert_is(latest, 1)
    assert latest is not None and "symbolic link" in latest.warnings[0] and str(path) in latest.warnings[0]


def altered_entry(**changes: object) -> dict[str, object]:
    return {"tensors": {"w": {"dtype": "float32", "shape": [7, 5], "parts": [[TENSORS, 0, 7]]} | changes}}


def resealed(folder: Path, **changes: object) -> Path:
    """A checkpoint of step 1 whose manifest was altered by someone who knows the format."""
    manifest = saved(folder, 1) / "step-00000001" / MANIFEST
    manifest.write_bytes(seal({**json.loads(manifest.read_bytes())["body"], **changes}))
    return manifest.parent


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "..", "sub/file"])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    files = {name: {"size": 0, "sha256": ""}, TENSORS: {"size": 0, "sha256": ""}}
    with pytest.raises(ValueError, match="leaves the folder"):
        load(resealed(tmp_path, files=files))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 1},
        {"step": 2},
        {"step": "1"},
        {"files": {}},
        {"files": []},
        {"files": {TENSORS: 3}},
        {"tensors": []},
        {"tensors": {"w": 3}},
        altered_entry(dtype="load"),
        altered_entry(dtype="float64"),
        altered_entry(shape=[8, 5]),
        altered_entry(shape=[-7, 5]),
        altered_entry(shape=[7, 6]),
        altered_entry(parts=[]),
        altered_entry(shape=[0, 5], parts=[]),
        altered_entry(dtype=["float32"]),
        altered_entry(dtype="Tensor"),
        altered_entry(parts=[["/etc/hostname", 0, 7]]),
        altered_entry(parts=[[TENSORS, 0, 7], [TENSORS, 0, 7]]),
        altered_entry(parts=[[TENSORS, 0, 7.0]]),
    ],
)
def test_altered_manifests_are_value_errors(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="step-00000001"):
        load(resealed(tmp_path, **changes))


def test_a_pickle_in_the_place_of_the_tensors_is_never_run(tmp_path: Path) -> None:
    """Even if the manifest has its hash: safetensors refuses the bytes."""
    crafted = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "ran") + b"'\ntR."
    folder = saved(tmp_path, 1) / "step-00000001"
    (folder / TENSORS).write_bytes(crafted)
    files = {TENSORS: {"size": len(crafted), "sha256": sha256(folder / TENSORS)}}
    manifest = folder / MANIFEST
    manifest.write_bytes(seal({**json.loads(manifest.read_bytes())["body"], "files": files}))
    with pytest.raises(ValueError, match="step-00000001"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_nan_in_the_state_is_refused_before_anything_is_committed(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with pytest.raises(ValueError):
        save(tmp_path, 2, tensors(2), {"loss": float("nan")})
    assert_is(load_latest(tmp_path), 1)


def test_rows_are_read_into_place(tmp_path: Path) -> None:
    latest = load_latest(saved(tmp_path, 1))
    assert latest is not None
    found, whole = latest.tensors, tensors(1)["w"]
    assert found.shape("w") == (7, 5) and len(found) == 4
    assert torch.equal(found.rows("w", 2, 6), whole[2:6])
    out = torch.full((9, 5), torch.nan)
    assert found.read_into(out[1:4], "w", 4).data_ptr() == out[1:].data_ptr()
    assert torch.equal(out[1:4], whole[4:]) and out[[0, 4]].isnan().all()
    found["w"].zero_()  # a copy, which the caller may change
    assert torch.equal(found["w"], whole)
    assert found.rows("w", 7, 7).shape == (0, 5)
    for rows in ((5, 8), (-1, 2)):
        with pytest.raises(ValueError, match=r"w is torch.float32 \[7, 5\]: it has no rows"):
            found.rows("w", *rows)
    for out in (torch.empty(2, 5).double(), torch.empty(2, 4)):
        with pytest.raises(ValueError, match=r"it has no rows 0 to 2 as torch.float"):
            found.read_into(out, "w")


@pytest.mark.parametrize("verify", ["size", "own", "all"])
def test_what_is_verified(tmp_path: Path, verify: checkpoint.Verify) -> None:
    file = saved(tmp_path, 1, 2) / "step-00000002" / TENSORS
    flip(file, -1)
    latest = load_latest(tmp_path, verify=verify)
    assert latest is not None and latest.step == (2 if verify == "size" else 1)
    file.write_bytes(file.read_bytes()[:-1])
    latest = load_latest(tmp_path, verify=verify)
    assert latest is not None and latest.step == 1 and f"{file}: " in latest.warnings[0]
    with pytest.raises(ValueError, match="verify = 'none': want 'size', 'own' or 'all'"):
        load_latest(tmp_path, verify="none")  # type: ignore[arg-type]


def test_a_file_in_the_place_of_another_is_refused(tmp_path: Path) -> None:
    """Even if it is a safetensors file and the manifest has its hash: its tensors are others."""
    folder = saved(tmp_path, 1) / "step-00000001"
    store.write_tensors(folder / TENSORS, {"v": torch.ones(7, 5)})
    files = {TENSORS: {"size": (folder / TENSORS).stat().st_size, "sha256": sha256(folder / TENSORS)}}
    body = json.loads((folder / MANIFEST).read_bytes())["body"]
    (folder / MANIFEST).write_bytes(seal({**body, "files": files}))
    with pytest.raises(ValueError, match=r"step-00000001/tensors.safetensors: not readable, or without"):
        load(folder)


def test_a_pickle_beside_the_files_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, 1) / "step-00000001"
    for name in (".metadata", "extra.pt", "data.pkl"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "ran") + b"'\ntR.")
    opened: list[str] = []
    original = io.open
    monkeypatch.setattr(io, "open", lambda file, *how: opened.append(Path(file).name) or original(file, *how))
    assert_is(load_latest(tmp_path), 1)
    assert not (tmp_path / "ran").exists() and set(opened) == {TENSORS, MANIFEST}


# ---------------------------------------------------------------------------------------------- disks and other runs


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow over 100 kB, which looks like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path, small_files: None) -> None:
    saved(tmp_path, 1)
    with pytest.raises(OSError, match=r"step-00000002\.\w+\.tmp/tensors.safetensors was not written: .*too large"):
        save(tmp_path, 2, {"w": torch.ones(200_000)}, {})
    assert_is(load_latest(tmp_path), 1)
    assert not list(tmp_path.glob("*.tmp")), "it would fill the disk further"
    with pytest.raises(OSError, match=r"step-00000002\.\w+\.tmp/manifest.json was not written: .*too large"):
        save(tmp_path, 2, {}, {"much": "a" * 200_000})
    assert_is(load_latest(tmp_path), 1)
    assert_is(load_latest(saved(tmp_path, 2)), 2)


def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    saved(tmp_path, 1)
    with (
        locked(tmp_path),
        pytest.raises(BlockingIOError, match=rf"in use by another run, process {os.getpid()} on .+: see"),
    ):
        saved(tmp_path, 2)
    assert_is(load_latest(tmp_path), 1)
    assert_is(load_latest(saved(tmp_path, 2)), 2)


def test_a_disk_that_knows_no_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="lock cannot be locked .*: nothing stops a second run"):
        saved(tmp_path, 1)
    assert_is(load_latest(tmp_path), 1)
