"""The commands plan and simulate: their options and the text that they print. Only simulate imports torch."""

from typing import Any

from fastmargin.driver.log import Log
from fastmargin.driver.sizing import plan
from fastmargin.driver.sizing.plan import DEVICES, GB, SPARE, ComputeDtype, Plan
from fastmargin.require import require

COLUMNS = (
    "classes", "fewest GPUs", "fewest, PartialFC", "GB a GPU", "GB, PartialFC", "MB sent", "head ms, at least",
    "bound by",
)  # fmt: skip
SUFFIXES = {"k": 1e3, "M": 1e6, "B": 1e9}


def count(name: str, text: str) -> int:
    """The number that 1000000, 1_000_000, 1e6 or 1M stands for. ValueError if it is no whole number."""
    digits, factor = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1.0)
    try:
        number = float(digits) * factor
        whole = int(number)
    except (ValueError, OverflowError):  # no number; nan or infinity
        whole, number = 0, 0.5  # differ, so that they are refused below
    require(whole == number, name, text, "a whole number, such as 1000000, 1e6 or 1M")
    return whole


def plan_options(parser: Any) -> Any:
    add = parser.add_argument
    add("--classes", type=str, required=True, help="C, such as 1e8 or 100M; several with commas give a table")
    add("--dim", type=str, default="512", help="width of the embeddings")
    add("--batch", type=str, default="128", help="rows of each GPU")
    add("--gpus", type=str, default="8", help="ranks, one GPU each")
    add("--sample_rate", type=float, default=1.0, help="share of the classes drawn in a step (PartialFC)")
    add("--device", type=str, default="h200", help=f"{', '.join(DEVICES)}; only the figures of cpu are measured")
    add("--optimizer", type=plan.Optimizer, default="sgd", help="sgd is with momentum")
    add("--in_backward", type=bool, default=True, help="update in the backward pass: no gradient is stored")
    add("--compute_dtype", type=ComputeDtype | None, help="operands of the products; null: the device's 16-bit type")
    add("--keep_bytes", type=str, default="0", help="memory of each GPU for exponentials kept for the backward pass")
    add("--topk", type=str, default="1", help="mined classes per row, and per class in the table; 0: no table")
    add("--backbone_gb", type=float, default=0.0, help="GB of each GPU for the backbone, its state and activations")
    return parser


def simulate_options(parser: Any) -> Any:
    add = parser.add_argument
    add("--ranks", type=str, required=True, help="N; they are computed one after another")
    add("--classes", type=str, default="10000", help="C; may be fewer than the ranks")
    add("--dim", type=str, default="64", help="width of the embeddings")
    add("--batch", type=str, default="1", help="rows of each rank")
    add("--topk", type=str, default="5", help="mined classes per row, 1 or more")
    return parser


def sized(given: Any, names: tuple[str, ...]) -> dict[str, int]:
    return {name: count(name, given[name]) for name in names}


def run_plan(given: Any, log: Log) -> None:
    values = given.as_dict() | sized(given, ("dim", "batch", "gpus", "topk", "keep_bytes"))
    plans = [Plan(**values | {"classes": count("classes", C)}) for C in given.classes.split(",")]
    log(report(plans[0]) if len(plans) == 1 else table(plans))


def run_simulate(given: Any, log: Log) -> None:
    """ValueError for sizes below 1; RuntimeError if the results of the ranks and of one process differ."""
    sizes = sized(given, ("ranks", "classes", "dim", "batch", "topk"))
    for name, size in sizes.items():
        require(size >= 1, name, size, "1 or more")
    p = Plan(sizes["classes"], sizes["dim"], sizes["batch"], sizes["ranks"], topk=sizes["topk"])
    from fastmargin.driver.sizing import simulate

    simulate.report(p, log)


def gigabytes(size: float) -> str:
    decimals = 3 if size < GB else 2 if size < 10 * GB else 0
    return f"{size / GB:,.{decimals}f}"


def milliseconds(time: float) -> str:
    return f"{time * 1e3:,.3g}" if time < 1 else f"{time * 1e3:,.0f}"


def listing(title: str, lines: dict[str, str]) -> list[str]:
    return ["", title, *(f"  {name:36}{value:>12}" for name, value in lines.items())]


def setting(p: Plan) -> str:
    """The settings in one line."""
    classes = "all classes" if p.sample_rate == 1 else f"{p.sample_rate:g} of the classes"
    update = "in backward" if p.in_backward else "after backward"
    return (
        f"d = {p.dim}, {p.batch} rows a rank, {classes} in a step, {p.operands} products, {p.optimizer} {update}, "
        f"k = {p.topk}, {p.on.title}" + (f", {p.backbone_gb:g} GB for the backbone" if p.backbone_gb else "")
    )


def verdict(p: Plan, sizes: dict[str, float], fewest: int | None) -> str:
    used, room = gigabytes(sum(sizes.values())), "fits" if plan.fits(p.on, sizes) else "does not fit"
    least = f"the fewest are {fewest:,}" if fewest else f"no number of GPUs up to {plan.MOST_GPUS:,} is enough"
    return f"{used} of {gigabytes(p.on.memory)} GB, {SPARE:.0%} of which are kept free: {room}; {least}"


def report(p: Plan) -> str:
    sizes, theirs, traffic, parts = plan.memory(p), plan.partial_fc(p), plan.wire(p), plan.phases(p)
    time = plan.seconds(p)
    out = [
        "Estimates by formula, not measured; formulas and sources: fastmargin/driver/sizing/plan.py",
        f"C = {p.classes:,} on {p.gpus:,} ranks: {setting(p)}",
        *listing("memory of a rank, GB", {name: gigabytes(size) for name, size in sizes.items()}),
        f"  {verdict(p, sizes, plan.smallest(p))}",
    ]
    if p.topk:
        out.append(f"  host: {gigabytes(plan.table_bytes(p))} GB for the mined table, for every rank")
    if traffic:
        out += listing("sent by a rank in a step, MB", {name: f"{size / 1e6:,.3g}" for name, size in traffic.items()})
        out.append(f"  {sum(traffic.values()) / 1e6:,.3g} MB; as many are received")
    out += listing(
        "step of the head alone, ms, at least",
        {f"{n}: {part.bound}": milliseconds(part.seconds) for n, part in parts.items()},
    )
    out.append(
        f"  {milliseconds(time)} in all, most of it bound by: {plan.bound(p)}; {p.rows / time:,.0f} rows/s at most"
    )
    out += listing("PartialFC at the same settings, GB", {n: gigabytes(size) for n, size in theirs.items() if size})
    out.append(f"  {verdict(p, theirs, plan.smallest(p, plan.partial_fc))}")
    return "\n".join(out)


def table(plans: list[Plan]) -> str:
    """A table in Markdown, a line for each number of classes."""
    first = plans[0]
    lines = [
        f"Estimates by formula, not measured: {first.gpus:,} ranks, {setting(first)}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{' ---: |' * 7} --- |",
    ]
    for p in plans:
        fewest = [plan.smallest(p), plan.smallest(p, plan.partial_fc)]
        sizes = [sum(plan.memory(p).values()), sum(plan.partial_fc(p).values())]
        cells = [
            f"{p.classes:,}",
            *("none" if gpus is None else f"{gpus:,}" for gpus in fewest),
            *(gigabytes(size) + ("" if plan.fits(p.on, {"": size}) else " (too much)") for size in sizes),
            f"{sum(plan.wire(p).values()) / 1e6:,.3g}",
            milliseconds(plan.seconds(p)),
            plan.bound(p),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
