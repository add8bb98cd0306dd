"""The command line: train, evaluate, embed, export, doppelgangers, clean, plan, simulate, info.

Options come from the environment (FASTMARGIN_TRAIN__OPTIM__STEPS), from `--config FILE` and from the command line; the
later one wins. An unknown key is an error. A mistake of the user (ValueError, OSError) ends in one line on stderr and
exit code 2; any other exception is a bug and keeps its traceback. SIGINT and SIGTERM let `train` save a checkpoint and
end with exit code 130 and 143: see `driver.training.signals`. torchrun may start `train` and `evaluate RUN` in many
processes: see `driver.training.processes`. What every process would say is printed once. torch is imported by the
commands, not here.
"""

import os
import sys
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import ActionConfigFile

from fastmargin import __version__
from fastmargin.driver.commands import scale
from fastmargin.driver.commands.parser import Parser, new_parser
from fastmargin.driver.config import CleanConfig, TrainConfig, from_dict
from fastmargin.driver.log import log, on_one_line
from fastmargin.driver.training import run_folder
from fastmargin.require import require

MISTAKE, INTERRUPTED = 2, 130
ENVIRONMENT = "The environment can give every option, too: --optim.lr of train as FASTMARGIN_TRAIN__OPTIM__LR."
RUN = "folder that `fastmargin train` wrote"
DEVICE = "cpu, cuda, cuda:1, ...; null: cuda where there is a GPU, else cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 0, 2 for a mistake of the user, 130 for an interrupt.

    Raises SystemExit with 130 or 143 if a signal stopped the training.
    """
    try:
        given = build_parser().parse_args(sys.argv[1:] if arguments is None else arguments)
        if given.command not in ("train", "evaluate"):
            require_one_process(given.command)
        COMMANDS[given.command](given[given.command])
    except (ArgumentError, ValueError, OSError) as mistake:
        if said := only_once(on_one_line(" ".join(str(mistake).split()))):
            print(f"fastmargin: {said}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("fastmargin: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def processes() -> int:
    """Number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def only_once(text: str) -> str | None:
    """The text that this process should print; None if another process prints the same."""
    if processes() == 1:
        return text
    from fastmargin.driver.training import processes as ours

    return ours.only_once(text)


def require_one_process(command: str) -> None:
    """ValueError if torchrun started several."""
    if processes() > 1:
        raise ValueError(f"{command} runs in one process, not {processes()}: torchrun is for train and evaluate RUN")


def build_parser() -> Parser:
    parser = new_parser(prog="fastmargin", description=f"Train and evaluate margin-softmax recognizers. {ENVIRONMENT}")
    parser.add_argument("--version", action="version", version=f"fastmargin {__version__}")
    commands = parser.add_subcommands(dest="command")
    commands.add_subcommand("train", train_parser(), help="train, evaluate on unseen identities, report")
    commands.add_subcommand("evaluate", evaluate_parser(), help="evaluate a run, or stored embeddings")
    commands.add_subcommand("embed", embed_parser(), help="write the embeddings of a data set by a run's network")
    commands.add_subcommand("export", export_parser(), help="write a run's network as safetensors, .pt2 and ONNX")
    commands.add_subcommand("doppelgangers", doppelgangers_parser(), help="list the look-alikes a run has mined")
    commands.add_subcommand("clean", clean_parser(), help="list suspicious images and identities of a data set")
    planning = new_parser(
        description="Memory, communication and time of a head of any size, estimated by formula.",
        epilog="Example: fastmargin plan --classes 1e8 --gpus 64 --sample_rate 0.1",
    )
    commands.add_subcommand("plan", scale.plan_options(planning), help="size a head before renting machines for it")
    simulating = new_parser(
        description="Compute the shards of N ranks one after another, and compare them with one process.",
        epilog="Example: fastmargin simulate --ranks 64 --classes 1000 --dim 16",
    )
    commands.add_subcommand("simulate", scale.simulate_options(simulating), help="check the arithmetic of N ranks")
    informing = new_parser(
        description="What is installed, and what can run on this machine.", epilog="Example: fastmargin info"
    )
    commands.add_subcommand("info", informing, help="versions, the native build, what can run here")
    return parser


def train_parser() -> Parser:
    parser = new_parser(
        description="Train on glyphs or images of your own, evaluate on identities never seen, report. SIGINT and "
        "SIGTERM save a checkpoint first and end it with exit code 130 and 143; a second SIGINT stops at once. To use "
        "N processes, each with a part of the classes and of every batch: torchrun --nproc-per-node N -m fastmargin "
        f"train ... {ENVIRONMENT}",
        usage="fastmargin train [options]",
        epilog="Example: fastmargin train --data.source synthetic:40x8 --data.size 16 --optim.steps 4 --out run",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML or JSON file of these options")
    parser.add_argument("--out", type=str | None, help="folder of the run; null: a new runs/DATE-TIME")
    for name, kind, default, help in options(TrainConfig):
        parser.add_argument(f"--{name}", type=kind, default=default, help=help)
    return parser


def evaluate_parser() -> Parser:
    parser = new_parser(
        description="Evaluate the last checkpoint of a run on the identities it held out, and draw its report again; "
        "or on a verification set; or evaluate stored embeddings.",
        epilog="Example: fastmargin evaluate run",
    )
    parser.add_argument(
        "run", type=str, help="folder that `fastmargin train` wrote, or a safetensors file as `fastmargin embed` writes"
    )
    parser.add_argument(
        "--pairs",
        type=str | None,
        help="for a run: a verification set of InsightFace (.bin); for embeddings: a pair list as LFW's pairs.txt, "
        "whose `name n` is the image of that name (without names, of that label) whose file name ends in n; without "
        "titles that are paths, its n-th row",
    )
    parser.add_argument(
        "--skip_missing",
        type=bool,
        default=False,
        help="for a pair list: leave out, and count, pairs with an image that the embeddings lack",
    )
    parser.add_argument(
        "--identities",
        type=Literal["held_out", "all"],
        default="held_out",
        help="for embeddings of a run's own data: all compares the identities it was trained on, too",
    )
    parser.add_argument(
        "--mirror",
        type=Literal["mean", "sum", "concat"] | None,
        help="for a .bin: how the embeddings of an image and its mirror image are combined; null: no mirror image",
    )
    parser.add_argument("--out", type=str | None, help="JSON file for the numbers; null: only print them")
    parser.add_argument("--device", type=str | None, help=DEVICE)
    return parser


def embed_parser() -> Parser:
    parser = new_parser(
        description="Embed a data set with the last checkpoint of a run, into a safetensors file: embeddings [N, d], "
        "not normalized, labels [N], names in the metadata, titles, the paths of the images, and for the run's own "
        "data held_out, which marks the identities it was not trained on. `evaluate` takes it.",
        epilog="Example: fastmargin embed run synthetic:10x4 --out embedded.safetensors",
    )
    parser.add_argument("run", type=str, help=RUN)
    parser.add_argument(
        "source",
        type=str | None,
        nargs="?",
        help="data to embed, as train's data.source; null: all data of the run, held out or not",
    )
    parser.add_argument("--out", type=str, required=True, help="safetensors file to write; an existing one is replaced")
    parser.add_argument("--device", type=str | None, help=DEVICE)
    return parser


def export_parser() -> Parser:
    parser = new_parser(
        description="Write the network of a run, without its head, as weights (safetensors), as a torch.export program "
        "(.pt2) and as ONNX; each is checked against the run's network.",
        epilog="Example: fastmargin export run --out exported",
    )
    parser.add_argument("run", type=str, help=RUN)
    parser.add_argument("--out", type=str, required=True, help="new or empty folder to write into")
    return parser


def doppelgangers_parser() -> Parser:
    parser = new_parser(
        description="The nearest wrong classes that a run has mined, as of its last checkpoint: print the most similar "
        "pairs (scores are cosines; logits for a plain layer) and the classes on most lists; write all lists as "
        "doppelgangers.csv, and the contact sheet doppelgangers.png.",
        epilog="Example: fastmargin doppelgangers run --limit 5 --out look-alikes",
    )
    parser.add_argument("run", type=str, help=RUN)
    parser.add_argument("--limit", type=int, default=20, help="number of pairs, and of classes, to print")
    parser.add_argument("--out", type=str | None, help="folder to write into; null: the run's report")
    return parser


def clean_parser() -> Parser:
    parser = new_parser(
        description="Embed a data set with the last checkpoint of a run, and list what needs a look: images.csv, the "
        "images of each identity by the cosine with its center (the mean of its unit embeddings), worst first; "
        "pairs.csv, identities with close centers; with --below remove.txt, with --against overlap.csv. No image is "
        "touched.",
        epilog="Example: fastmargin clean run --below 0.3 --against synthetic:10x4 --out cleaning",
    )
    parser.add_argument("run", type=str, help=RUN)
    parser.add_argument("--out", type=str, required=True, help="new or empty folder to write into")
    for name, kind, default, help in options(CleanConfig):
        parser.add_argument(f"--{name}", type=kind, default=default, help=help)
    return parser


def options(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, type, default, help) of every option of a configuration dataclass."""
    hints = get_type_hints(kind)
    for entry in fields(kind):
        if is_dataclass(hints[entry.name]):
            yield from options(hints[entry.name], f"{prefix}{entry.name}.")
        else:
            default = {} if entry.default is MISSING else entry.default  # a mapping has a default_factory
            yield prefix + entry.name, hints[entry.name], default, entry.metadata["help"]


def train(given: Any) -> None:
    values = given.as_dict()
    values.pop("config")
    out = values.pop("out")
    config = from_dict(TrainConfig, values)
    if out is not None:
        run_folder.check(Path(out), config)
        if run_folder.finished(Path(out)):
            said = only_once(f"{out} holds a finished run: nothing to do")
            return log(said) if said else None
    from fastmargin.driver.commands import train as training

    training.train(config, out, log)


def evaluate(given: Any) -> None:
    what, stored = Path(given.run), Path(given.run).is_file()
    if not stored:
        run_folder.read_config(what)
    require(
        given.mirror is None or (given.pairs and not stored), "mirror", given.mirror, "null without a run and --pairs"
    )
    want = "its default for anything but embeddings"
    require(stored or given.identities == "held_out", "identities", given.identities, want)
    require((stored and given.pairs) or not given.skip_missing, "skip_missing", True, "false without a pair list")
    require(given.out is None or given.pairs or stored, "out", given.out, "null: a run's numbers go to its folder")
    if stored or given.pairs:
        require_one_process("evaluate of stored embeddings, or with --pairs,")
    from fastmargin.driver.commands import evaluate as evaluation
    from fastmargin.driver.commands import verify

    if stored:
        verify.evaluate_stored(what, given.pairs, given.out, log, given.identities, given.skip_missing)
    elif given.pairs:
        verify.evaluate_set(what, given.pairs, given.mirror, given.out, log, device=given.device)
    else:
        evaluation.evaluate(what, log, device=given.device)


def embed(given: Any) -> None:
    run_folder.read_config(Path(given.run))
    from fastmargin.driver.commands import embed as embedding

    embedding.embed(Path(given.run), given.source, Path(given.out), log, device=given.device)


def export(given: Any) -> None:
    run_folder.read_config(Path(given.run))
    from fastmargin.driver.commands import export as exporter

    exporter.export(Path(given.run), Path(given.out), log)


def doppelgangers(given: Any) -> None:
    run_folder.read_config(Path(given.run))
    require(given.limit >= 1, "limit", given.limit, "at least 1")
    from fastmargin.driver.commands import doppelgangers as mined

    mined.doppelgangers(Path(given.run), None if given.out is None else Path(given.out), given.limit, log)


def clean(given: Any) -> None:
    values = given.as_dict()
    where, out = Path(values.pop("run")), Path(values.pop("out"))
    config = from_dict(CleanConfig, values)
    run_folder.read_config(where)
    from fastmargin.driver.commands import clean as cleaning

    cleaning.clean(where, out, config, log)


def plan(given: Any) -> None:
    scale.run_plan(given, log)


def simulate(given: Any) -> None:
    scale.run_simulate(given, log)


def info(_: Any) -> None:
    from fastmargin.ops import backends

    log(f"{'fastmargin':10} {__version__}\n{backends.describe()}")


COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "embed": embed,
    "export": export,
    "doppelgangers": doppelgangers,
    "clean": clean,
    "plan": plan,
    "simulate": simulate,
    "info": info,
}
