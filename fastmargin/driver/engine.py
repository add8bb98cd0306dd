"""The training run: loop, train_step; at its end, evaluation on identities never trained on.

n steps, a stop and n more are 2 n steps, bit for bit, at one number of threads: see `driver.run`. (With sampled classes
and SGD a checkpoint brings late rows up to date, which rounds them: only a stop at a step of `save_every` is exact.)
How a step moves the weights is in `driver.optimizers`, how a signal stops a run in `driver.signals`, what N processes
tell each other in `driver.processes`: on as many, a stop changes no bit; on another number, sums are rounded otherwise.
"""

import math
import platform
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import tqdm

from fastmargin import __version__, checkpoint
from fastmargin.driver import folder, processes, report, signals, tensorboard
from fastmargin.driver.augment import to_float
from fastmargin.driver.config import TrainConfig
from fastmargin.driver.data import Stored
from fastmargin.driver.loader import augmentation, batches
from fastmargin.driver.optimizers import update_average
from fastmargin.driver.run import DTYPES, Log, Run, build, build_margin, restore, start_from, state, tensors, trained
from fastmargin.driver.stopwatch import Stopwatch, machine
from fastmargin.evaluation import cosine_scores, evaluate_embeddings, roc
from fastmargin.files import locked
from fastmargin.head import HeadOutput
from fastmargin.mining import DoppelgangerBatchSampler
from fastmargin.sampling import key
from fastmargin.schedules import MarginRamp

EDGE = 20  # steps at the start, in the middle and at the end whose angles are kept
EMBED = 512  # images embedded at once
RAW_SIDE = 32  # pixels a side of the images that are compared as they are


def train(config: TrainConfig, out: str | None, log: Log, model: str | None = None) -> Path:
    """Trains in a new folder, or resumes in `out`; evaluates, reports, and returns the folder of the run.

    model: import path "package.module:factory" of a network of your own, see `fastmargin.models.build_model`;
    None: config.model. It is given from Python alone, also to resume or to evaluate.
    Under torchrun, or where torch.distributed runs already, all processes call this with the same arguments and train
    together; the first one alone logs and writes.
    ValueError for options that do not fit together, a folder that holds another run, checkpoints that are all
    damaged, and a loss or a gradient that is not finite; BlockingIOError if a run is training in the folder.
    `signals.Stopped`, a SystemExit, after SIGINT or SIGTERM.
    """
    if config.tensorboard:
        tensorboard.summary_writer()  # or a mistake, before any work
    with processes.joined() as ours, ExitStack() as held:
        log = ours.log(log)
        run = build(config, log, model, ours)
        begun = out is not None and checkpoint.committed(Path(out) / folder.CHECKPOINTS)
        if config.init_from is not None and not begun:
            start_from(run, Path(config.init_from), log)
        where = ours.by_first(partial(claim, out, run.config, held))
        log(
            f"run {where}: {run.train.num_classes} identities, {len(run.train.images)} images to train on, "
            f"{' x '.join(map(str, run.train.images.shape[1:]))}, augmentation {augmentation(config.data)}; "
            f"{run.config.optim.steps} steps of {run.config.optim.batch_size} images"
        )
        log(f"network {run.factory or run.config.model.name}, {run.config.dim} features; {described(run)}")
        resume(run, where, log)
        loop(run, where, log)
        finish(run, where, log)
    return where


def described(run: Run) -> str:
    """The margin with its numbers, those that defaults have filled in and a schedule will reach."""
    grows = f", m from 0 within {run.schedule.steps} steps" if isinstance(run.schedule, MarginRamp) else ""
    return f"{build_margin(run.config.head)}{grows}"


def claim(out: str | None, config: TrainConfig, held: ExitStack) -> Path:
    """Makes the folder of the run, and holds its lock."""
    where = folder.claim(out, config)
    held.enter_context(locked(where))
    return where


def evaluate(where: Path, log: Log, model: str | None = None, device: str | None = None) -> None:
    """Evaluates the last checkpoint of a run; model as for `train`; device: None is a GPU where there is
    one. ValueError if there is no checkpoint."""
    config = folder.read_config(where)
    with processes.joined() as ours:
        log = ours.log(log)
        run = build(replace(config, device=device), log, model, ours)
        if not resume(run, where, log):
            raise ValueError(f"{where} has no checkpoint yet")
        finish(run, where, log)


def resume(run: Run, where: Path, log: Log) -> bool:
    """Takes up the newest checkpoint of the folder; False if there is none. ValueError if it does not fit."""
    saved = checkpoint.load_latest(where / folder.CHECKPOINTS, group=run.processes.host)
    if saved is None:
        return False
    for warning in saved.warnings:
        log(f"passed over a damaged checkpoint: {warning}")
    restore(run, saved)
    log(f"checkpoint of step {run.step} of {run.config.optim.steps}")
    return True


def loop(run: Run, where: Path, log: Log) -> None:
    """Trains to the last step; records and saves on the way. `signals.Stopped` after a signal, with all saved."""
    config, last, first = run.config, run.config.optim.steps, run.processes.rank == 0
    board = tensorboard.Board(where, run.step) if config.tensorboard and first else None
    run.watch, here = Stopwatch(run.head.weight.device), machine(run.head.weight.device, run.processes.count)
    since, clock = run.step, time.perf_counter()
    bar = tqdm(total=last, initial=run.step, unit="step", disable=not (first and sys.stderr.isatty()))
    with bar, signals.noted() as noted:
        for images, labels in batches(run):
            run.watch("loader")
            out = train_step(run, images, labels)
            keep_cosines(run, out.target_score)
            bar.update()
            stop = run.processes.agree(noted.number)
            saving = stop or run.step % config.save_every == 0 or run.step == last
            if saving or run.step % config.log_every == 0:
                record = measure(run, out)  # waits for the device
                now, steps = time.perf_counter(), run.step - since
                run.seconds += now - clock
                record["images_per_second"] = round(config.optim.batch_size * steps / (now - clock), 1)
                record |= {"seconds": run.watch.per_step(steps), "machine": here}
                since, clock = run.step, now
                if first:
                    folder.append_record(where, record)
                if board:
                    board.add(record)
                if not bar.disable:
                    bar.set_postfix_str(report.progress(record))
                elif run.step * 10 // last > (run.step - steps) * 10 // last:  # every tenth of the run
                    log(f"step {run.step:>{len(str(last))}} of {last}: {report.progress(record)}")
            if saving:
                held = tensors(run), state(run)
                checkpoint.save(where / folder.CHECKPOINTS, run.step, *held, group=run.processes.host)
            if stop or (run.step == last and (stop := run.processes.agree(noted.number))):  # during the last save, too
                again = "" if run.factory else f". To go on: {folder.resuming(where)}"  # or from Python
                log(f"{signal.Signals(stop).name}: stopped, with a checkpoint of step {run.step} of {last}{again}")
                raise signals.Stopped(stop)
            run.watch("rest")


def train_step(
    run: Run,
    images: Tensor,  # [b, c, H, W] float32, of this process
    labels: Tensor,  # [b] int64
) -> HeadOutput:  # of these rows
    """One step of the optimisers. On a GPU the host waits for the step before (see `driver.mined`), and with sampled
    classes or terms for this one."""
    torch.manual_seed(key(run.config.seed, run.step, run.processes.rank))  # dropout and random margins
    run.optimizers.set_rate(run.step)
    run.optimizers.zero_grad()
    parts = run.config.optim.accumulation
    done: list[tuple[HeadOutput, Tensor, dict[str, Tensor]]] = []
    for part in zip(images.chunk(parts), labels.chunk(parts), strict=True):
        with nullcontext() if len(done) == parts - 1 else processes.unreduced(run.replica):
            done.append(backward(run, *part, 1 / parts))
    run.optimizers.step()
    outs, embeddings, terms = zip(*done, strict=True)
    out = joined(outs)
    run.terms.last = {name: torch.stack([values[name] for values in terms]).mean() for name in terms[0]}
    there = labels.to(run.device, non_blocking=True)
    run.terms.update(torch.cat(embeddings), there, run.optimizers.rate)
    run.mined.add(labels if run.processes.group is None else there, out)
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
    """Adds the gradient of some images of a step."""
    listed = run.table.classes[labels].to(run.device, non_blocking=True) if run.config.head.sample_rate < 1 else None
    images, labels = (t.to(run.device, non_blocking=True) for t in (images, labels))
    precision = DTYPES[run.config.optim.precision]
    with torch.autocast(run.device.type, precision, enabled=precision is not None):
        embeddings = run.replica(images)
    embeddings = embeddings.float()
    run.watch("backbone")
    out = run.head(embeddings, labels, hard_classes=listed)
    loss = out.loss + run.terms(embeddings, labels)
    run.watch("head")
    run.watch.split(embeddings)
    run.optimizers.backward(loss * share)
    run.watch("backbone" if embeddings.requires_grad else "head")
    return out._replace(loss=out.loss.detach()), embeddings.detach(), run.terms.last


def joined(outs: Sequence[HeadOutput]) -> HeadOutput:
    """Of the parts of a step, all of one size."""
    losses, *rows = zip(*outs, strict=True)
    return HeadOutput(torch.stack(losses).mean(), *map(torch.cat, rows))


def keep_cosines(
    run: Run,
    scores: Tensor,  # [b]
) -> None:
    """Gathers all rows' cosines of EDGE steps at the start, in the middle and at the end; a plain layer has none."""
    if run.head.margin.plain:
        return
    edge = max(1, min(EDGE, run.config.optim.steps // 3))
    spare = run.config.optim.steps - edge
    for stage, before in {"start": 0, "middle": spare // 2, "end": spare}.items():
        if before < run.step <= before + edge:
            run.cosines[stage] = torch.cat([run.cosines[stage], run.rows.gather(scores)])


def measure(run: Run, out: HeadOutput) -> dict[str, Any]:
    """The record of a step, of the rows of all processes. ValueError, in all of them, if the run has gone wrong.

    step                optimiser steps made
    loss                the head's, in nats, the mean over the rows of the step
    objective           what is minimised, loss + sum of weight x term; where there are terms
    terms               each by name, before its weight
    target_score        mean cosine (logit of a plain layer) of a row and its own class
    lr, margin          learning rate; m, null where the margin has not one number
    confusable_batches, confusable_classes, list_turnover: since the record before, see `mining.MiningStatistics`
    images_per_second   since the record before
    seconds             of a step, by part: `driver.stopwatch`
    machine             what it ran on
    """
    run.head.check()
    weight = run.processes.count * run.rows.count / run.rows.total
    own = [out.loss.item(), weight * out.target_score.mean().item()]
    terms = {name: value.item() for name, value in run.terms.last.items()}
    broken = run.optimizers.failed() or not all(numbers.isfinite().all() for numbers in trained(run))
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


# Evaluation


def finish(run: Run, where: Path, log: Log) -> None:
    """Evaluates beside raw pixels, draws the report, then writes metrics.json, the sign that all is done.

    Of several processes each embeds its share of the images, and the first one does the rest.
    """
    begin = time.perf_counter()
    run.mined.enter()
    run.processes.copy_buffers(run.network)
    share = replace(run.processes.share(len(run.test.labels)), group=run.processes.host)
    images = run.test.take(np.arange(share.start, share.stop)).images
    embeddings = share.gather(embed(run.network, images))
    run.processes.by_first(partial(describe, run, where, embeddings, begin, log))


def describe(
    run: Run,
    where: Path,
    embeddings: Tensor,  # [N, d] of the images held out
    begin: float,  # of the evaluation, by the clock
    log: Log,
) -> None:
    images, labels = run.test.images, run.test.labels
    compared = {"model": embeddings, "raw_pixels": embed(RawPixels(), images)}
    seed = run.config.data.split_seed
    results = {name: evaluate_embeddings(x, labels, seed) for name, x in compared.items()}
    run.cosines = {stage: scores.cpu() for stage, scores in run.cosines.items()}
    run.head.margin.cpu()  # it is drawn, too
    curves = {name: roc(*cosine_scores(x, labels)) for name, x in compared.items()}
    metrics = {
        "step": run.step,
        **{name: resolvable(result) for name, result in results.items()},
        "seconds": {"training": round(run.seconds, 1), "evaluation": round(time.perf_counter() - begin, 1)},
        "versions": {
            "fastmargin": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "config": asdict(run.config),
    }
    report.draw(where, run, report.Measured(metrics, curves, embeddings.norm(dim=1)))
    folder.write_json(where / folder.METRICS, metrics)
    log(report.table(metrics))
    log(f"report: {where / folder.REPORT / report.INDEX}, metrics: {where / folder.METRICS}")


def resolvable(result: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: what could not be measured is null."""
    return {name: None if math.isnan(value) else value for name, value in result.items()}


class RawPixels(nn.Module):
    """Images as they are, averaged over tiles down to RAW_SIDE pixels a side.

    A black one, which has no direction, is taken for a white one.
    """

    def forward(
        self,
        images: Tensor,  # [B, c, H, W]
    ) -> Tensor:  # [B, c * H * W]
        side = min(RAW_SIDE, images.shape[-1])
        x = adaptive_avg_pool2d(images, side).flatten(1)
        return x.masked_fill(~x.any(dim=1, keepdim=True), 1)


@torch.inference_mode()
def embed(
    model: nn.Module,
    images: Tensor | Stored,  # [N, H, W] or [N, H, W, 3] uint8
) -> Tensor:  # [N, d], in host memory
    """Embeddings in evaluation mode, on the model's device; the mode is put back afterwards."""
    training, device = model.training, next((p.device for p in model.parameters()), "cpu")
    model.eval()
    blocks = np.array_split(np.arange(len(images)), range(EMBED, len(images), EMBED))
    embeddings = torch.cat([model(to_float(images[block]).to(device)).cpu() for block in blocks])
    model.train(training)
    return embeddings
