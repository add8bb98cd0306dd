"""Seconds and bytes of a checkpoint of a head of a million classes, d = 128, with momentum, by 1, 2 and 4 processes.

`python bench/checkpoint.py [FOLDER]` writes to FOLDER (or a temporary folder). It prints the slowest rank's median of
three rounds, beside `torch.save` with fsync and `torch.load` of the same tensors, and the peak memory above that of
head and optimizer, mapped files not counted. Files are read from the page cache: the time of a disk is not included.
"""

import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

import fastmargin as fm
from fastmargin import checkpoint
from fastmargin.files import fsync

C, D = 1_000_000, 128
ROUNDS = 3


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as scratch:
        print(f"torch {torch.__version__}, {os.cpu_count()} cores, C = {C:,}, d = {D}, one thread a process")
        for ranks in (1, 2, 4):
            context = multiprocessing.get_context("spawn")
            answers = context.SimpleQueue()
            arguments = [(rank, ranks, Path(scratch), answers) for rank in range(ranks)]
            processes = [context.Process(target=measure, args=each) for each in arguments]
            for process in processes:
                process.start()
            found = [answers.get() for _ in processes]
            for process in processes:
                process.join()
            for name in found[0]:
                print(f"{ranks} processes, {name:28}{max(theirs[name] for theirs in found):10.2f}")


def measure(rank: int, ranks: int, scratch: Path, answers: "multiprocessing.SimpleQueue[dict[str, float]]") -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(scratch / f"store-{ranks}"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    group = dist.group.WORLD
    head = fm.MarginHead(D, C, fm.ArcFace(), group=group)
    classes = fm.optim.ClassSGD(head, 0.1, 0.9)
    classes.state_tensor("momentum_buffer").normal_()
    parts = {"head": head, "classes": classes}
    folder, file = scratch / f"{ranks}", scratch / f"{rank}.pt"

    def save() -> None:
        checkpoint.save(folder, 1, *checkpoint.pack(parts), group=group)

    def load(verify: checkpoint.Verify) -> None:
        saved = checkpoint.load_latest(folder, group=group, verify=verify)
        assert saved is not None
        checkpoint.unpack(saved, parts)

    def torch_save() -> None:
        torch.save({"head": head.state_dict(), "classes": classes.state_dict()}, file)
        fsync(file)

    def torch_load() -> None:
        found = torch.load(file, weights_only=True)
        head.load_state_dict(found["head"])
        classes.load_state_dict(found["classes"])

    found = {"save, s": timed(save), "memory of save, MiB": memory(save)}
    found |= {"load, s": timed(lambda: load("own")), "memory of load, MiB": memory(lambda: load("own"))}
    found |= {"load, sizes alone, s": timed(lambda: load("size"))}
    found |= {"size, MB": sum(f.stat().st_size for f in folder.rglob("*.*") if f.is_file()) / 1e6}
    found |= {"torch.save, s": timed(torch_save), "torch.load, s": timed(torch_load)}
    answers.put(found)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    dist.destroy_process_group()


def timed(action: Callable[[], None]) -> float:
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return median(seconds)


def memory(action: Callable[[], None]) -> float:
    """MiB of anonymous memory at the peak of the action above what was held before it, sampled every 5 ms."""
    before, seen, done = anonymous(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    dist.barrier()
    action()
    done.set()
    watcher.join()
    return max(seen)


def anonymous() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


if __name__ == "__main__":
    main()
