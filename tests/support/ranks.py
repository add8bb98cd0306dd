"""Processes that are the ranks of a Gloo group: started once, they run task after task, each in a group of its own."""

import contextlib
import multiprocessing
import pickle
import socket
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = timedelta(seconds=20)  # of a group: a collective that not all ranks join


class Ranks:
    """`run(N, task, *args)`: what task(*args) returns on each of the ranks 0..N-1; an exception is a result, too."""

    def __init__(self, most):
        context = multiprocessing.get_context("forkserver")  # a process that has imported all, and starts nothing
        context.set_forkserver_preload(["torch.distributed", "fastmargin.head.margin_head", "fastmargin.optim"])
        self.pipes, self.processes = [], []
        for _ in range(most):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, ranks, task, *args):
        self.send(ranks, task, *args)
        return [self.result(rank) for rank in range(ranks)]

    def send(self, ranks, task, *args, timeout=TIMEOUT):
        port = free_port()
        for rank, pipe in enumerate(self.pipes[:ranks]):
            pipe.send_bytes(pickle.dumps((rank, ranks, port, timeout, task, args)))

    def result(self, rank):
        if not self.pipes[rank].poll(90):
            raise TimeoutError(f"rank {rank} hangs")
        return pickle.loads(self.pipes[rank].recv_bytes())

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def serve(pipe):
    torch.set_num_threads(1)
    while True:
        rank, ranks, port, timeout, task, args = pickle.loads(pipe.recv_bytes())
        try:
            dist.init_process_group(
                "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, timeout=timeout
            )
            torch.manual_seed(rank)
            result = task(*args)
        except Exception as error:
            error.add_note(traceback.format_exc())
            result = error
        pipe.send_bytes(pickle.dumps(result))
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
