"""fastmargin evaluate RUN: the network on identities held out, compared with raw pixels; report and metrics.json."""

import math
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from fastmargin import __version__
from fastmargin.driver.log import Log
from fastmargin.driver.reports import report
from fastmargin.driver.training import processes, run_folder
from fastmargin.driver.training.backbone import embed_images
from fastmargin.driver.training.run import Run, build
from fastmargin.driver.training.state import resume
from fastmargin.evaluation import cosine_scores, evaluate_embeddings, roc

RAW_SIDE = 32  # pixels a side, at most, of the raw images that are compared


def evaluate(where: Path, log: Log, model: str | None = None, device: str | None = None) -> None:
    """Evaluates the last checkpoint of a run. model: as for `train.train`; device: None is a GPU where there is one.

    ValueError if there is no checkpoint.
    """
    config = run_folder.read_config(where)
    with processes.process_group() as ours:
        log = ours.log(log)
        run = build(replace(config, device=device), log, model, ours)
        if not resume(run, where, log):
            raise ValueError(f"{where} has no checkpoint yet")
        finish(run, where, log)


def finish(run: Run, where: Path, log: Log) -> None:
    """Evaluates network and raw pixels, draws the report, then writes metrics.json, which marks the run as finished.

    Each process embeds its share of the images, and the first one does the rest.
    """
    begin = time.perf_counter()
    run.table_feed.flush()
    run.processes.copy_buffers(run.network)
    share = replace(run.processes.share(len(run.test.labels)), group=run.processes.host)
    images = run.test.take(np.arange(share.start, share.stop)).images
    embeddings = share.gather(embed_images(run.network, images))
    run.processes.by_first(partial(describe, run, where, embeddings, begin, log))


def describe(
    run: Run,
    where: Path,
    embeddings: Tensor,  # [N, d] of the images held out
    begin: float,  # time.perf_counter() when the evaluation began
    log: Log,
) -> None:
    images, labels = run.test.images, run.test.labels
    compared = {"model": embeddings, "raw_pixels": embed_images(RawPixels(), images)}
    seed = run.config.data.split_seed
    results = {name: evaluate_embeddings(x, labels, seed) for name, x in compared.items()}
    run.cosines = {stage: scores.cpu() for stage, scores in run.cosines.items()}
    run.head.margin.cpu()  # the report plots it
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
    run_folder.write_json(where / run_folder.METRICS, metrics)
    log(report.table(metrics))
    log(f"report: {where / run_folder.REPORT / report.INDEX}, metrics: {where / run_folder.METRICS}")


def resolvable(result: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: a value that could not be measured becomes None."""
    return {name: None if math.isnan(value) else value for name, value in result.items()}


class RawPixels(nn.Module):
    """A baseline without a network: the pixels, averaged over tiles down to RAW_SIDE a side, are the embedding.

    A black image, which has no direction, counts as a white one.
    """

    def forward(
        self,
        images: Tensor,  # [B, c, H, W]
    ) -> Tensor:  # [B, c * H * W]
        side = min(RAW_SIDE, images.shape[-1])
        x = adaptive_avg_pool2d(images, side).flatten(1)
        return x.masked_fill(~x.any(dim=1, keepdim=True), 1)
