"""fastmargin train: claim a folder, build or resume the run, train to the last step, evaluate."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fastmargin.checkpoint.store import committed
from fastmargin.distributed.agreement import check_equal
from fastmargin.driver.commands.evaluate import finish
from fastmargin.driver.config import TrainConfig
from fastmargin.driver.data.augmentation import augmentation
from fastmargin.driver.log import Log
from fastmargin.driver.training import processes, run_folder, tensorboard
from fastmargin.driver.training.loop import loop
from fastmargin.driver.training.run import Run, build, build_margin
from fastmargin.driver.training.state import resume, start_from
from fastmargin.files import locked
from fastmargin.margins.schedules import MarginRamp


def train(config: TrainConfig, out: str | None, log: Log, model: str | None = None) -> Path:
    """Trains in a new folder, or resumes in `out`; evaluates, reports, and returns the folder of the run.

    model: import path "package.module:factory" of a network of your own, see `fastmargin.models.build_model`;
    None: config.model. It can be given only from Python, and has to be given again to resume or to evaluate.
    Under torchrun, or if torch.distributed is initialized already, all processes call this with the same arguments and
    train together; only the first one logs and writes.
    ValueError for options that do not fit together, processes whose options or data differ, a folder that holds another
    run, checkpoints that are all damaged, and a loss or a gradient that is not finite; BlockingIOError if a run is
    training in the folder.
    `signals.Stopped`, a SystemExit, after SIGINT or SIGTERM.
    """
    if config.tensorboard:
        tensorboard.summary_writer()  # fails here, before any work, where TensorBoard is not installed
    with processes.process_group() as ours, ExitStack() as held:
        log = ours.log(log)
        check_equal({"out": out}, ours.host)
        run = build(config, log, model, ours)
        begun = out is not None and committed(Path(out) / run_folder.CHECKPOINTS)
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
    """The margin with its numbers: those of the defaults too, and m as it is at the end of its schedule."""
    grows = f", m from 0 within {run.schedule.steps} steps" if isinstance(run.schedule, MarginRamp) else ""
    return f"{build_margin(run.config.head)}{grows}"


def claim(out: str | None, config: TrainConfig, held: ExitStack) -> Path:
    """Makes the folder of the run and takes its lock."""
    where = run_folder.claim(out, config)
    held.enter_context(locked(where))
    return where
