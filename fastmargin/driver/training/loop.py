"""The training loop: one optimizer step, the records, and when to save and to stop.

A run that is stopped and resumed ends with the same bits as one that is not, at one number of threads and of processes
(on another number, sums are rounded differently). One exception: with sampled classes and SGD a checkpoint applies
pending lazy updates, which rounds those rows, so there only a stop at a step of `save_every` is exact.

What a run holds is in run.py, what a checkpoint holds in state.py, how weights are updated in optimizers.py, how a
signal stops a run in signals.py, and what the processes exchange in processes.py.
"""

import math
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastmargin import checkpoint
from fastmargin.driver.log import Log
from fastmargin.driver.training import processes, run_folder, signals, tensorboard
from fastmargin.driver.training.loader import batches
from fastmargin.driver.training.optimizers import update_average
from fastmargin.driver.training.run import DTYPES, Run, mutable_tensors
from fastmargin.driver.training.state import state, tensors
from fastmargin.driver.training.stopwatch import Stopwatch, machine
from fastmargin.head.margin_head import HeadOutput
from fastmargin.head.sampling import derive_seed
from fastmargin.mining import DoppelgangerBatchSampler

EDGE = 20  # steps at the start, in the middle and at the end whose target cosines are kept


def loop(run: Run, where: Path, log: Log) -> None:
    """Trains to the last step, with records and checkpoints on the way. After a signal saves and raises Stopped."""
    config, last, first = run.config, run.config.optim.steps, run.processes.rank == 0
    board = tensorboard.Board(where, run.step) if config.tensorboard and first else None
    run.watch, here = Stopwatch(run.head.weight.device), machine(run.head.weight.device, run.processes.count)
    since, clock = run.step, time.perf_counter()
    bar = tqdm(total=last, initial=run.step, unit="step", disable=not (first and sys.stderr.isatty()))
    with bar, signals.noted() as noted:
        for images, labels in batches(run.batch_source()):
            run.watch("loader")
            out = train_step(run, images, labels)
            keep_cosines(run, out.target_score)
            bar.update()
            stop = run.processes.all_reduce_max(noted.number)
            saving = stop or run.step % config.save_every == 0 or run.step == last
            if saving or run.step % config.log_every == 0:
                record = measure(run, out)  # waits for the device
                now, steps = time.perf_counter(), run.step - since
                run.seconds += now - clock
                record["images_per_second"] = round(config.optim.batch_size * steps / (now - clock), 1)
                record |= {"seconds": run.watch.per_step(steps), "machine": here}
                since, clock = run.step, now
                if first:
                    run_folder.append_record(where, record)
                if board:
                    board.add(record)
                if not bar.disable:
                    bar.set_postfix_str(progress(record))
                elif run.step * 10 // last > (run.step - steps) * 10 // last:  # a line per tenth of the run
                    log(f"step {run.step:>{len(str(last))}} of {last}: {progress(record)}")
            if saving:
                held = tensors(run), state(run)
                checkpoint.save(where / run_folder.CHECKPOINTS, run.step, *held, group=run.processes.host)
            if run.step == last and not stop:
                stop = run.processes.all_reduce_max(noted.number)  # a signal may have come during the last save
            if stop:
                again = "" if run.factory else f". To go on: {run_folder.resuming(where)}"  # else only from Python
                log(f"{signal.Signals(stop).name}: stopped, with a checkpoint of step {run.step} of {last}{again}")
                raise signals.Stopped(stop)
            run.watch("rest")


def train_step(
    run: Run,
    images: Tensor,  # [b, c, H, W] float32, of this process
    labels: Tensor,  # [b] int64
) -> HeadOutput:  # of these rows
    """One optimizer step. On a GPU the host waits for the step before (table_feed.py); with terms, or with sampled
    classes of the backends stream and reference, it waits for this one, too."""
    torch.manual_seed(derive_seed(run.config.seed, run.step, run.processes.rank))  # dropout and random margins
    run.optimizers.set_rate(run.step)
    run.optimizers.zero_grad()
    parts = run.config.optim.accumulation
    done: list[tuple[HeadOutput, Tensor, dict[str, Tensor]]] = []
    for part in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with nullcontext() if len(done) == parts - 1 else processes.unreduced(run.replica):
            done.append(backward(run, *part, 1 / parts))
    run.optimizers.step()
    outs, embeddings, terms = zip(*done, strict=True)
    out = concatenated(outs)
    run.terms.last = {name: torch.stack([values[name] for values in terms]).mean() for name in terms[0]}
    there = labels.to(run.device, non_blocking=True)
    run.terms.update(torch.cat(embeddings), there, run.optimizers.rate)
    run.table_feed.add(labels if run.processes.group is None else there, out)
    if run.schedule:
        run.schedule.step()
    if isinstance(run.order, DoppelgangerBatchSampler):
        run.order.step()
    run.step += 1
    if run.average is not None and run.config.optim.ema is not None:
        update_average(run.average, run.model, run.config.optim.ema, run.step)
    return out


def backward(
    run: Run,
    images: Tensor,  # [b, c, H, W] float32
    labels: Tensor,  # [b] int64
    share: float,  # of these images in the step
) -> tuple[HeadOutput, Tensor, dict[str, Tensor]]:  # of the head, embeddings [b, d], terms by name; all detached
    """Forward and backward pass of one part of a step; gradients accumulate."""
    doppelgangers = (
        run.table.classes[labels].to(run.device, non_blocking=True) if run.config.head.sample_rate < 1 else None
    )
    images, labels = (t.to(run.device, non_blocking=True) for t in (images, labels))
    precision = DTYPES[run.config.optim.precision]
    with torch.autocast(run.device.type, precision, enabled=precision is not None):
        embeddings = run.replica(images)
    embeddings = embeddings.float()
    run.watch("backbone")
    out = run.head(embeddings, labels, hard_classes=doppelgangers)
    loss = out.loss + run.terms(embeddings, labels)
    run.watch("head")
    run.watch.split(embeddings)
    run.optimizers.backward(loss * share)
    run.watch("backbone" if embeddings.requires_grad else "head")
    return out._replace(loss=out.loss.detach()), embeddings.detach(), run.terms.last


def concatenated(outs: Sequence[HeadOutput]) -> HeadOutput:
    """The output of a step, from those of its parts, which have one size."""
    losses, *rows = zip(*outs, strict=True)
    return HeadOutput(torch.stack(losses).mean(), *map(torch.cat, rows))


def keep_cosines(
    run: Run,
    scores: Tensor,  # [b]
) -> None:
    """Keeps all rows' target cosines in EDGE steps at the start, middle and end; a plain layer has none."""
    if run.head.margin.plain:
        return
    edge = max(1, min(EDGE, run.config.optim.steps // 3))
    spare = run.config.optim.steps - edge
    for stage, before in {"start": 0, "middle": spare // 2, "end": spare}.items():
        if before < run.step <= before + edge:
            run.cosines[stage] = torch.cat([run.cosines[stage], run.rows.gather(scores)])


def measure(run: Run, out: HeadOutput) -> dict[str, Any]:
    """The record of a step, over the rows of all processes. ValueError, on every rank, if training has diverged.

    step                optimizer steps made
    loss                the head's, in nats, the mean over the rows of the step
    objective           what is minimized, loss + sum of weight x term; only where there are terms
    terms               each by name, before its weight
    target_score        mean cosine (of a plain layer: logit) of a row and its own class
    lr, margin          learning rate; m, null where the margin is not one number
    confusable_batches, confusable_classes, list_turnover: since the last record, see `mining.MiningStatistics`
    images_per_second   since the last record
    seconds             per step, by part, see stopwatch.py
    machine             what the run is on
    """
    run.head.check()
    weight = run.processes.count * run.rows.count / run.rows.total
    own = [out.loss.item(), weight * out.target_score.mean().item()]
    terms = {name: value.item() for name, value in run.terms.last.items()}
    broken = run.optimizers.failed() or not all(numbers.isfinite().all() for numbers in mutable_tensors(run))
    loss, score, broken_somewhere, *values = run.processes.mean([*own, broken, *terms.values()])
    record: dict[str, Any] = {
        "step": run.step,
        "loss": loss,
        "terms": dict(zip(terms, values, strict=True)),
        "target_score": score,
        "lr": run.optimizers.rate,
        "margin": getattr(run.head.margin, "m", None),
        **run.table.statistics.take(),
    }
    if terms:
        record["objective"] = loss + sum(run.terms.weights[name] * value for name, value in record["terms"].items())
    if broken_somewhere or not all(map(math.isfinite, (loss, *values))):
        raise ValueError(
            f"training diverged by step {run.step}: the loss is {loss}, or a term, a gradient, a weight or "
            "a statistic not finite. The last checkpoint is kept; a smaller optim.lr may help"
        )
    return record


def progress(record: Mapping[str, Any]) -> str:
    """A record in one line. The objective comes first, where it is more than the head's loss; m, as it raises both."""
    terms = f"objective {record['objective']:.3f}, head " if "objective" in record else ""
    m = "" if record["margin"] is None else f"m {record['margin']:.3f}, "
    return (
        f"{terms}loss {record['loss']:.3f}, {m}target score {record['target_score']:.3f}, "
        f"{record['images_per_second']:.0f} images/s"
    )
