"""Random against mined batches, on glyphs: the experiment of Doppelganger Mining's Table 4 (ICCVW 2017), made small.

    python bench/mining.py DIR      trains the runs that DIR lacks, then prints the table

Both samplers make batches of 2 to 8 images per class. The random one draws all classes at random; the mined one a third
of them, and the others are their doppelgangers, in chains of three. Steps, seeds and the other options are equal.

Coverage is that of one-shot novel identities (4.1): each held-out identity has one image as its prototype, each trained
one the mean of its images; every other image of the held-out ones is a probe, accepted if its best cosine is high
enough. "Right" is the share of probes whose best prototype is their own. Both are means over five draws of the
prototypes' images. "novel alone" are the same figures without the prototypes of trained identities.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor

from fastmargin.driver.commands import train
from fastmargin.driver.config import HeadConfig, OptimConfig, SamplerConfig, TermConfig, TrainConfig
from fastmargin.driver.training import backbone, state
from fastmargin.driver.training.run import build
from fastmargin.evaluation import classify, coverage_at_precision, prototypes

STEPS, SEEDS, DRAWS = 800, (0, 1, 2), 5
MARGIN_BASED = {"margin_based": TermConfig(weight=10.0)}
LOSSES = {
    "L2Softmax": (HeadConfig(margin="L2Softmax"), {}),
    "L2Softmax + margin-based": (HeadConfig(margin="L2Softmax"), MARGIN_BASED),
    "ArcFace": (HeadConfig(), {}),
    "ArcFace + margin-based": (HeadConfig(), MARGIN_BASED),
}
COLUMNS = (
    "coverage at 95 %", "at 99 %", "right", "novel alone: at 95 %", "novel alone: at 99 %", "novel alone: right",
    "TAR at FAR 1e-3",
)  # fmt: skip
RANDOM = {"random": 1.0, "mined": 1 / 3}  # share of a batch's classes that are drawn at random


def runs() -> Iterator[tuple[str, str, int, TrainConfig]]:
    for seed, (loss, (head, terms)), (batches, share) in itertools.product(SEEDS, LOSSES.items(), RANDOM.items()):
        sampler = SamplerConfig(name="doppelganger", random_classes=share)
        optim = OptimConfig(steps=STEPS)
        yield (
            loss,
            batches,
            seed,
            replace(TrainConfig(), head=head, terms=terms, sampler=sampler, optim=optim, seed=seed, save_every=STEPS),
        )


def one_shot(
    trained: Tensor,  # [N, d]
    trained_labels: Tensor,  # [N]
    novel: Tensor,  # [M, d]
    novel_labels: Tensor,  # [M]
) -> dict[str, float]:
    centers, classes = prototypes(trained, trained_labels)
    labels, found = novel_labels.numpy() + len(classes), []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(labels))
        one = order[np.unique(labels[order], return_index=True)[1]]  # an image of each novel identity
        probes = np.setdiff1d(order, one)
        row = []
        for others in (slice(None), slice(0)):  # all trained identities, none
            gallery = np.concatenate([centers[others], novel[one].numpy()])
            confidence, correct = classify(
                novel[probes].numpy(), labels[probes], gallery, np.concatenate([classes[others], labels[one]])
            )
            row += [coverage_at_precision(confidence, correct, p) for p in (0.95, 0.99)] + [correct.mean()]
        found.append(row)
    return dict(zip(COLUMNS, np.mean(found, axis=0).tolist(), strict=False))


def measure(config: TrainConfig, where: Path) -> dict[str, float]:
    """Trains, unless that was done before."""
    result = where / "one_shot.json"
    if not result.is_file():
        if not (where / "metrics.json").is_file():
            train.train(config, str(where), print)
        run = build(config, print)
        state.resume(run, where, print)
        sets = [(backbone.embed_images(run.network, part.images), part.labels) for part in (run.train, run.test)]
        tar = json.loads((where / "metrics.json").read_text())["model"]["tar@1e-3"]
        result.write_text(json.dumps({**one_shot(*sets[0], *sets[1]), COLUMNS[-1]: tar}))
    return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    table: dict[tuple[str, str], list[dict[str, float]]] = {}
    for loss, batches, seed, config in runs():
        name = f"{loss}-{batches}-{seed}".replace(" ", "")
        table.setdefault((loss, batches), []).append(measure(config, folder / name))
    print(f"| loss | batches | {' | '.join(COLUMNS)} |\n|{' --- |' * (2 + len(COLUMNS))}")
    for (loss, batches), results in table.items():
        cells = [" ".join(f"{r[name]:.3f}".removeprefix("0") for r in results) for name in COLUMNS]
        print(f"| {loss} | {batches} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
