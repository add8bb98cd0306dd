"""Checkpoints saved by N ranks and loaded by M; damage and mistakes on one rank are errors on all."""

import json
import os
import resource
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fastmargin as fm
from fastmargin.checkpoint import Sharded, load, load_latest, pack, save, unpack
from fastmargin.checkpoint.store import MANIFEST, committed, seal
from fastmargin.checkpoint.tensors import TENSORS
from fastmargin.files import locked, sha256

SIZES = (1, 2, 3, 10, 1009)
OPTIMIZERS = {
    "sgd": lambda head: fm.optim.ClassSGD(head, 0.1, 0.9, 5e-4),
    "adamw": lambda head: fm.optim.ClassAdamW(head, 0.01),
}


def group():
    return dist.group.WORLD


# ---------------------------------------------------------------------------------------------- N to M


def parts_of(**options):
    """Heads of all sizes, by name, and their optimizers."""
    parts = {}
    for C in SIZES:
        for name, optimizer in OPTIMIZERS.items():
            head = fm.MarginHead(5, C, fm.NormFace() if C == 1 else fm.ArcFace(), group=group(), **options)
            parts[f"{C} {name}"], parts[f"{C} {name} classes"] = head, optimizer(head)
    return parts


def state_of(parts):
    """{head: weight and the optimizer's tensors}, rows of the classes held here."""
    found = {}
    for name, head in parts.items():
        if isinstance(head, fm.MarginHead):
            kept = head.class_optimizer.state[head.weight]
            assert kept["step"] == 2
            found[name] = {"weight": head.weight.detach()} | {n: t for n, t in kept.items() if n != "step"}
    return found


def save_all(folder):
    """Makes two steps with each head and saves; returns this rank's rows."""
    parts = parts_of()
    for head in parts.values():
        if isinstance(head, fm.MarginHead):
            for _ in range(2):
                head.class_optimizer.zero_grad()
                head(torch.randn(3, 5), torch.randint(0, head.num_classes, (3,))).loss.backward()
                head.class_optimizer.step()
    save(folder, 2, *pack(parts), group=group())
    return state_of(parts)


class Opened(dict):
    """The open files by name; `ever` keeps the names of closed ones, too."""

    def __init__(self):
        self.ever = set()

    def __setitem__(self, name, file):
        self.ever.add(name)
        super().__setitem__(name, file)


def load_all(folder, truth):
    parts = parts_of(seed=1)
    saved = load_latest(folder, group=group())
    assert saved.step == 2 and saved.warnings == []
    opened = saved.tensors.opened = Opened()
    unpack(saved, parts)
    needed = {TENSORS}
    for key, found in state_of(parts).items():
        lo, hi = parts[key].class_range
        assert found.keys() == truth[key].keys() and len(found) > 1
        for name, t in found.items():
            assert torch.equal(t, truth[key][name][lo:hi]), (key, name)
        needed |= {p.file for p in saved.tensors.entries[f"{key}/weight"].parts if p.start < hi and lo < p.stop}
    assert opened.ever == needed, "no others' shards are opened"
    assert not opened, "and none is left open"


@pytest.fixture(scope="module")
def written(ranks, tmp_path_factory):
    """{N: (folder, the whole tensors)}"""
    made = {}
    for N in range(1, 5):
        folder = tmp_path_factory.mktemp(f"of-{N}")
        all_ranks = ranks(N, save_all, folder)
        truth = {
            key: {name: torch.cat([rows[key][name] for rows in all_ranks]) for name in kept}
            for key, kept in all_ranks[0].items()
        }
        made[N] = folder, truth
    return made


@pytest.mark.parametrize("M", range(1, 5))
def test_any_number_of_ranks_takes_up_what_any_other_wrote(ranks, written, M):
    for folder, truth in written.values():
        ranks(M, load_all, folder, truth)


def test_one_process_without_a_group_reads_it_too(written):
    folder, truth = written[3]
    head = fm.MarginHead(5, 10, fm.ArcFace(), sample_rate=0.5)  # which counts its steps, as those of a group do
    optimizer = fm.optim.ClassSGD(head, 0.2, 0.9)
    saved = load_latest(folder, verify="all")
    unpack(saved, {"10 sgd": head, "10 sgd classes": optimizer})
    assert torch.equal(head.weight, truth["10 sgd"]["weight"]) and head.counter.step == 2
    assert torch.equal(optimizer.state_tensor("momentum_buffer"), truth["10 sgd"]["momentum_buffer"])
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert torch.equal(saved.tensors["10 sgd/weight"], head.weight), "the whole, from three files"
    unpack(saved, {"10 sgd": (plain := fm.MarginHead(5, 10, fm.ArcFace()))})  # which counts nothing
    assert torch.equal(plain.weight, head.weight)
    for other, message in (
        (fm.MarginHead(5, 11, fm.ArcFace(), sample_rate=0.5), r"10 sgd/weight is \[10, 5\]: want \[11, 5\]"),
        (head.double(), "10 sgd/weight is torch.float32"),
        (torch.nn.Linear(5, 10), "no attribute 'head'"),
    ):
        with pytest.raises(ValueError, match=rf"(?s)step-00000002: 10 sgd does not fit: .*{message}"):
            unpack(saved, {"10 sgd": other})
    with pytest.raises(ValueError, match="has no 'heads': it has 1 sgd, 1 sgd classes, "):
        unpack(saved, {"heads": head})


def test_pending_lazy_updates_are_not_applied_to_the_weights_read(tmp_path):
    head = fm.MarginHead(5, 1009, fm.ArcFace(), sample_rate=0.1)
    parts = {"classes": fm.optim.ClassSGD(head, 0.1, 0.9, 0.1), "head": head}

    def step():
        head(torch.randn(4, 5), torch.arange(4)).loss.backward()
        parts["classes"].step()
        parts["classes"].zero_grad()

    step()
    save(tmp_path, 1, *pack(parts))
    kept = head.weight.detach().clone(), parts["classes"].state_tensor("momentum_buffer").clone()
    for names in (("classes", "head"), ("head", "classes")):
        step()
        assert parts["classes"].steps_applied is not None, "skipped rows"
        unpack(load_latest(tmp_path), {name: parts[name] for name in names})
        parts["classes"].apply_lazy_updates()
        assert torch.equal(head.weight, kept[0])
        assert torch.equal(parts["classes"].state_tensor("momentum_buffer"), kept[1])


def test_what_is_no_tensor_or_json_is_refused_by_name():
    class Odd:
        def state_dict(self):
            return {"a": [1, {2}]}

    with pytest.raises(ValueError, match="odd/a/1 is a set: want tensors"):
        pack({"odd": Odd()})


# ---------------------------------------------------------------------------------------------- 2n = n + n


def training(folder, steps, sample_rate=1.0):
    """Loads the folder's newest checkpoint, if any, and trains to `steps`, saving every third: a backbone, both
    optimizers, a schedule, a table, a random number of torch."""
    rank, N = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    backbone = nn.Linear(4, 5)
    head = fm.MarginHead(5, 10, fm.ArcFace(s=8), topk=2, sample_rate=sample_rate, group=group())
    classes = fm.optim.ClassSGD(head, 0.1, 0.9, 5e-4, nesterov=True, in_backward=True)
    others = torch.optim.AdamW(backbone.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.StepLR(classes, 2, 0.5)
    table = fm.DoppelgangerTable(10, 2)
    parts = dict(backbone=backbone, head=head, classes=classes, others=others, schedule=schedule, table=table)
    saved = load_latest(folder, group=group())
    done = 0
    if saved:
        unpack(saved, parts)
        done = saved.step
        torch.set_rng_state(saved.tensors.rows("random", 0, 1)[0])
    model = DistributedDataParallel(backbone)
    for number in range(done, steps):
        images, y = torch.randn(12, 4), torch.randint(0, 10, (12,))  # equal on all ranks, by their random state
        own = slice(12 * rank // N, 12 * (rank + 1) // N)
        others.zero_grad()
        out = head(model(images[own]), y[own])
        out.loss.backward()
        classes.step()
        others.step()
        schedule.step()
        whole = [torch.cat(dist_gather(t)) for t in (y[own], out.hard_scores, out.hard_classes)]
        table.update(*whole)
        if (number + 1) % 3 == 0:
            tensors, state = pack(parts)
            tensors["random"] = Sharded(torch.get_rng_state()[None], rank, N)
            save(folder, number + 1, tensors, state, group=group())
    return dict(backbone.state_dict()), table.state_dict()


def dist_gather(own):
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return parts


def tensors_of(folder):
    saved = load_latest(folder)
    assert saved.step == 6
    return {name: saved.tensors[name] for name in saved.tensors if name != "random"}


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_a_stop_changes_nothing(ranks, tmp_path, sample_rate):
    """n steps, a stop and n more by new processes are 2 n steps: bit for bit on as many, else to rounding."""
    ranks(2, training, tmp_path / "whole", 6, sample_rate)
    truth = tensors_of(tmp_path / "whole")
    assert {name.split("/")[0] for name in truth} == {"backbone", "head", "classes", "others", "table"}
    ranks(2, training, tmp_path / "parts", 3, sample_rate)
    ranks(2, training, tmp_path / "parts", 6, sample_rate)
    again = tensors_of(tmp_path / "parts")
    assert again.keys() == truth.keys() and all(torch.equal(again[name], t) for name, t in truth.items())
    ranks(3, training, tmp_path / "resharded", 3, sample_rate)
    ranks(1, training, tmp_path / "resharded", 4, sample_rate)
    ranks(4, training, tmp_path / "resharded", 6, sample_rate)
    again = tensors_of(tmp_path / "resharded")
    assert again.keys() == truth.keys()
    for name, t in truth.items():
        torch.testing.assert_close(again[name], t, rtol=1e-4, atol=1e-5, msg=lambda said, name=name: f"{name}: {said}")


# ---------------------------------------------------------------------------------------------- damage and mistakes


def numbers(step):
    """Seven rows over the ranks, and a tensor that all have."""
    rank, N = dist.get_rank(), dist.get_world_size()
    n = -(-7 // N)
    rows = torch.arange(21.0).view(7, 3) + 100 * step
    return {"rows": Sharded(rows[rank * n : (rank + 1) * n], min(7, rank * n), 7), "whole": torch.full((4,), step)}


def assert_numbers(saved, step):
    assert saved.step == step and saved.state == {"at": step}
    assert torch.equal(saved.tensors["rows"], torch.arange(21.0).view(7, 3) + 100 * step)
    assert torch.equal(saved.tensors["whole"], torch.full((4,), step))


def save_numbers(folder, *steps):
    for step in steps:
        save(folder, step, numbers(step), {"at": step}, group=group())


def damage(folder, flip):
    """Damages every file in turn: all ranks fall back, and warn of what which rank found."""
    save_numbers(folder, 1, 2)
    newest = folder / "step-00000002"
    files = sorted(newest.iterdir())
    assert [file.name for file in files] == [MANIFEST, *(f"rows-{r:05d}.safetensors" for r in range(3)), TENSORS]
    for file in files:
        whole = file.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            broken = whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] if flip else whole[:place]
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(broken)
            dist.barrier()
            saved = load_latest(folder, group=group())
            assert_numbers(saved, 1)
            (said,) = saved.warnings
            owner = int(file.name[5:10]) if flip and file.name.startswith("rows") else 0
            assert f"rank {owner}: {file}: " in said
            dist.barrier()
            if dist.get_rank() == 0:
                file.write_bytes(whole)
    dist.barrier()
    assert_numbers(load_latest(folder, group=group()), 2)


@pytest.mark.parametrize("flip", [True, False], ids=["flipped", "truncated"])
def test_damage_of_any_file_is_seen_by_all_ranks(ranks, tmp_path, flip):
    ranks(3, damage, tmp_path, flip)


def test_a_rank_hashes_what_it_reads(ranks, tmp_path):
    ranks(3, save_numbers, tmp_path, 1)
    path = tmp_path / "step-00000001"
    file = path / "rows-00001.safetensors"  # rows 3, 4 and 5
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for count in (1, 2, 3, 4):  # ranks with 7; 4 + 3; 3 + 3 + 1; 2 + 2 + 2 + 1 rows
        for rank in range(count):
            load(path, verify="size", rank=rank, ranks=count)
            needed = {1: (0,), 2: (0, 1), 3: (1,), 4: (1, 2)}[count]
            if rank in needed:
                with pytest.raises(ValueError, match="rows-00001"):
                    load(path, rank=rank, ranks=count)
            else:
                load(path, rank=rank, ranks=count)
            with pytest.raises(ValueError, match="rows-00001"):
                load(path, verify="all", rank=rank, ranks=count)


@contextmanager
def refused(kind, message):
    """Every rank raises, and all of them the same kind of error."""
    with pytest.raises(kind, match=message) as caught:
        yield
    all_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(all_ranks, type(caught.value).__name__)
    assert len(set(all_ranks)) == 1


def mistakes(folder, other):
    rank = dist.get_rank()
    save_numbers(folder, 1)

    wrong = numbers(2)
    if rank == 1:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    with refused(OSError, r"rank 1: .*step-00000002\.\w+\.tmp/rows-00001.safetensors was not written: .*too large"):
        save(folder, 2, wrong, {}, group=group())
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if rank == 0:  # the others may already see the folder of the next save
        assert not list(folder.glob("*.tmp"))

    for rows, message in (
        (Sharded(torch.zeros(3, 3), 2, 7), r"rank 0: rows \[7, 3\] has the rows .*\(2, 5\), \(6, 7\)\]: want all"),
        (Sharded(torch.zeros(3, 4), 3, 7), r"rank 0: rows is float32 \[7, 3\] and float32 \[7, 4\] and"),
        (Sharded(torch.zeros(3, 3).double(), 3, 7), "rows is float32 .* and float64"),
    ):  # fmt: skip
        with refused(ValueError, message):
            save(folder, 2, numbers(2) | ({"rows": rows} if rank == 1 else {}), {}, group=group())
    whole = distribute_tensor(torch.ones(3), init_device_mesh("cpu", (3,)))
    with refused(ValueError, r"rank 2: whole is a DTensor: want its full_tensor\(\), or a Sharded"):
        save(folder, 2, numbers(2) | {"whole": whole}, {}, group=group())
    with refused(ValueError, "rank 0: .*NaN|rank 0: Out of range"):
        save(folder, 2, numbers(2), {"loss": float("nan")}, group=group())
    with refused(RuntimeError, "rank 0: Object of type object is not JSON serializable"):
        save(folder, 2, numbers(2), {"loss": object()}, group=group())
    with refused(OSError, r"rank 2: .*other/step-00000002\.\w+\.tmp/rows-00002.safetensors was not written"):
        save(other if rank == 2 else folder, 2, numbers(2), {}, group=group())
    with refused(OSError, "rank 0: .* is in use by another run, process"), locked(folder) if rank == 0 else idle():
        save(folder, 2, numbers(2), {}, group=group())

    assert_numbers(load_latest(folder, group=group()), 1)
    save_numbers(folder, 2, 3)
    assert_numbers(load_latest(folder, group=group()), 3)
    assert load_latest(other, group=group()) is None


@contextmanager
def idle():
    yield


def test_every_rank_sees_a_mistake(ranks, tmp_path):
    ranks(3, mistakes, tmp_path / "folder", tmp_path / "other")


def nothing_left(folder):
    for path in committed(folder):
        if dist.get_rank() == 0:
            (path / "rows-00001.safetensors").unlink()
    dist.barrier()
    with refused(ValueError, r"no checkpoint in .* can be used: .*rank 1: .*rows-00001.safetensors: missing"):
        load_latest(folder, group=group())


def test_nothing_usable_is_an_error_on_all_ranks(ranks, tmp_path):
    ranks(2, save_numbers, tmp_path, 1, 2)
    ranks(2, nothing_left, tmp_path)


def test_a_pickle_in_the_place_of_a_ranks_rows_is_never_run(ranks, tmp_path):
    """Even if the manifest has its hash."""
    ranks(2, save_numbers, tmp_path, 1)
    path = tmp_path / "step-00000001"
    crafted = b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "ran") + b"'\ntR."
    (path / "rows-00001.safetensors").write_bytes(crafted)
    body = json.loads((path / MANIFEST).read_bytes())["body"]
    digest = sha256(path / "rows-00001.safetensors")
    body["files"]["rows-00001.safetensors"] = {"size": len(crafted), "sha256": digest}
    (path / MANIFEST).write_bytes(seal(body))
    with pytest.raises(ValueError, match=r"rows-00001.*: not readable"):
        load(path)
    assert not (tmp_path / "ran").exists()
