"""SIGKILL of a rank during a save: the last complete step can be loaded, bit for bit, and the next save works."""

import contextlib
import os
import random
import shutil
import signal
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from test_checkpoint_ranks import assert_numbers, group, numbers, save_numbers

from fastmargin.checkpoint import load_latest, save, store
from fastmargin.checkpoint.store import MANIFEST

RANKS, TIMEOUT = 3, timedelta(seconds=5)
POINTS = {  # the victim dies before rank 0 calls this
    "before": "prepare",
    "mid-write": "write_tensors",  # here: in the victim's own call, with half a file written
    "before the manifest": "write_manifest",
    "before the rename": "rename",
    "between two renames": "rename",  # of a step that is saved again
    "after the rename": "prune",
    "during retention": "rmtree",  # an old folder half removed
}
CASES = [(point, victim) for point in POINTS for victim in (0, random.Random(point).choice((1, 2)))]


def step_saved(point):
    return 2 if point == "between two renames" else 3


def die(folder, point, victim):
    """Saves step 3, or 2 again, and kills the victim at the point. Survivors return or raise what they got."""
    processes = [None] * RANKS
    dist.all_gather_object(processes, os.getpid())
    rank, name = dist.get_rank(), POINTS[point]
    place = shutil if name == "rmtree" else store
    original = getattr(place, name)

    def fatal(first, *others, **options):
        if name == "write_tensors":
            original(first, *others)
            os.truncate(first, first.stat().st_size // 2)
        elif name == "rmtree":
            (first / MANIFEST).unlink()
        os.kill(processes[victim], signal.SIGKILL)
        setattr(place, name, original)
        return original(first, *others, **options)

    if rank == (victim if name == "write_tensors" else 0):
        setattr(place, name, fatal)
    try:
        step = step_saved(point)
        save(folder, step, numbers(step), {"at": step}, group=group())
    finally:
        setattr(place, name, original)


@pytest.mark.parametrize(("point", "victim"), CASES)
def test_the_next_load_is_the_last_complete_step(ranks, tmp_path, point, victim):
    ranks(RANKS, save_numbers, tmp_path, 1, 2)
    pool = Ranks(RANKS)
    try:
        pool.send(RANKS, die, tmp_path, point, victim, timeout=TIMEOUT)
        for rank in range(RANKS):
            with pytest.raises(EOFError) if rank == victim else contextlib.nullcontext():
                assert isinstance(pool.result(rank), RuntimeError), "a survivor hears of it"
    finally:
        pool.close()
    saved = load_latest(tmp_path)
    assert saved.warnings == []
    lost = point in ("before", "mid-write") or (victim == 0 and point in ("before the manifest", "before the rename"))
    assert_numbers(saved, 2 if lost else step_saved(point))  # rank 0 commits, whoever else has died meanwhile
    ranks(RANKS - 1, save_numbers, tmp_path, 4)  # neither the lock of the dead process nor its files are in the way
    assert_numbers(load_latest(tmp_path), 4)
    assert {path.name for path in tmp_path.iterdir()} == {"lock", f"step-{saved.step:08d}", "step-00000004"}
    assert torch.equal(load_latest(tmp_path).tensors["rows"], torch.arange(21.0).view(7, 3) + 400)
