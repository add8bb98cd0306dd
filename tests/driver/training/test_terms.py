"""Losses beside the head's in a training run: their sum, when centers are updated, exact resume, mistakes."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_run import (  # noqa: F401 (the fixtures hold here, too)
    SMALL,
    load_data,
    records,
    small_data,
    stop_at,
    train_loop,
)

import fastmargin as fm
from fastmargin import checkpoint
from fastmargin.driver.commands import cli, train
from fastmargin.driver.config import HeadConfig, TermConfig, TrainConfig
from fastmargin.driver.training import backbone, loader, loop, run, run_folder
from fastmargin.driver.training.optimizers import Optimizers
from fastmargin.driver.training.terms import Terms
from fastmargin.evaluation import class_distances

pytestmark = pytest.mark.usefixtures("one_thread")

D = SMALL.dim


def with_terms(base: TrainConfig = SMALL, **terms: Any) -> TrainConfig:
    """git={"weight": 0.1, "pairs": "samples"} is a term with this weight; the rest are its options."""
    made = {}
    for name, options in terms.items():
        options = dict(options)
        made[name] = TermConfig(options.pop("weight", 1.0), options)
    return replace(base, terms=made)


def terms_of(**terms: Any) -> Terms:
    return Terms(with_terms(**terms).terms, num_classes=9, dim=D)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(16, D), torch.randint(0, 9, (16,))


GIT = with_terms(replace(SMALL, head=HeadConfig("Softmax")), center={"weight": 0.01}, git={"weight": 0.5})
MML = {"weight": 1e-3, "margin": 20.0}
DOP = with_terms(
    replace(SMALL, head=HeadConfig("L2Softmax")),
    LiftedStructureLoss={"weight": 0.1, "scale": 12.0},
    margin_based={"weight": 1.0},
)
JOINT = {
    "git": GIT,
    "mml": with_terms(center={"weight": 0.01, "update": "ema", "alpha": 0.3}, minimum_margin=MML),
    "means": with_terms(minimum_margin=MML | {"route": "batch_means", "scope": "all"}),
    "trained": with_terms(center={"weight": 0.01}, minimum_margin=MML | {"route": "centers"}),
    "dop": DOP,
    "pairs": with_terms(marginal={"threshold": 1.2, "error_margin": 0.3}, range={"weight": 0.01, "margin": 9.0}),
}


# ---------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("name", JOINT)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if name == "dop":
        pytest.importorskip("pytorch_metric_learning")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_loop(JOINT[name], whole)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_at(patch, 7)
        train_loop(JOINT[name], parts)
    torch.manual_seed(7)
    train_loop(JOINT[name], parts)
    expected, got = (checkpoint.load_latest(where / "checkpoints") for where in (whole, parts))
    assert expected is not None and got is not None and got.step == 12
    assert got.tensors.keys() == expected.tensors.keys()
    assert [name for name, tensor in expected.tensors.items() if not torch.equal(got.tensors[name], tensor)] == []
    assert records(parts) == records(whole)


def test_checkpoints_hold_centers_and_what_terms_learn(tmp_path: Path) -> None:
    config = with_terms(center={"weight": 0.01}, margin_based={})
    current = train_loop(config, tmp_path)
    saved = checkpoint.load_latest(tmp_path / "checkpoints")
    assert saved is not None and current.terms.bank is not None
    names = {name for name in saved.tensors if name.startswith("terms/")}
    assert names == {"terms/bank.centers", "terms/learned.margin_based.beta"}
    assert torch.equal(saved.tensors["terms/bank.centers"], current.terms.bank.centers)
    assert "optimizer/terms.learned.margin_based.beta.momentum_buffer" in saved.tensors
    assert saved.tensors["terms/learned.margin_based.beta"] != 0.5
    assert saved.state["config"]["terms"]["center"] == {"weight": 0.01, "options": {}}


def test_losses_see_the_old_centers_and_the_loss_is_the_weighted_sum() -> None:
    current = run.build(GIT, print)
    bank = current.terms.bank
    assert bank is not None
    bank.centers.copy_(torch.randn_like(bank.centers))
    old, seen = bank.centers.clone(), []
    current.model.register_forward_hook(lambda _, __, x: (x.retain_grad(), seen.append(x))[0])
    images, labels = next(loader.batches(current.batch_source()))
    out = loop.train_step(current, images, labels)
    x = seen[0].detach().requires_grad_()
    expected = {"center": fm.center_loss(x, labels, old), "git": fm.git_loss(x, labels, old)}
    assert {k: v.item() for k, v in current.terms.last.items()} == {k: v.item() for k, v in expected.items()}
    fresh = fm.CenterBank(*old.shape[::-1])
    fresh.centers.copy_(old)
    fresh.update(x, labels)
    assert torch.equal(bank.centers, fresh.centers) and not torch.equal(bank.centers, old)
    run_again = run.build(GIT, print)
    of_head = run_again.head(x, labels).loss
    (of_head + 0.01 * expected["center"] + 0.5 * expected["git"]).backward()
    torch.testing.assert_close(seen[0].grad, x.grad)
    assert out.loss == of_head


def test_each_term_is_in_the_records_without_its_weight(tmp_path: Path) -> None:
    current = train_loop(GIT, tmp_path)
    lines = records(tmp_path)
    assert all(line["terms"].keys() == {"center", "git"} for line in lines)  # type: ignore[attr-defined]
    assert lines[-1]["terms"] == {name: value.item() for name, value in current.terms.last.items()}
    train_loop(SMALL, tmp_path / "none")
    assert records(tmp_path / "none")[0]["terms"] == {} and "objective" not in records(tmp_path / "none")[0]


def test_the_objective_is_what_is_minimized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is also what is printed first; `loss` is that of the head."""
    given: list[float] = []
    original = Optimizers.backward
    monkeypatch.setattr(Optimizers, "backward", lambda self, loss: (given.append(loss.item()), original(self, loss))[1])
    config = with_terms(center={"weight": 100.0}, git={"weight": 0.5})
    train_loop(replace(config, log_every=1), tmp_path)
    lines = records(tmp_path)
    assert [line["objective"] for line in lines] == pytest.approx(given)
    assert all(line["objective"] > line["loss"] + 1 for line in lines)
    assert f"objective {lines[-1]['objective']:.3f}, head loss {lines[-1]['loss']:.3f}" in capsys.readouterr().out


def test_a_term_of_weight_0_changes_no_bit(tmp_path: Path) -> None:
    base = replace(SMALL, head=HeadConfig("ElasticFace"))  # whose margins come from torch's generator
    plain = train_loop(base, tmp_path / "plain")
    terms = {"center": {"weight": 0.0}, "range": {"weight": 0.0, "margin": 9.0}}
    watched = train_loop(with_terms(base, **terms), tmp_path / "watched")
    for (name, one), (_, other) in zip(
        plain.model.state_dict().items(), watched.model.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), name


def test_a_term_that_is_not_finite_is_divergence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training diverged by step \d+: .* or a term"):
        train_loop(with_terms(center={"weight": 1e38, "reduction": "sum"}), tmp_path)


def test_center_loss_draws_classes_together(tmp_path: Path) -> None:
    """The trend of GIT Table 1: the spread of a class falls as the weight grows."""
    intra, base = [], replace(SMALL, head=HeadConfig("Softmax"), optim=replace(SMALL.optim, steps=60))
    for weight in (0.0, 1.0, 10.0):
        config = with_terms(base, center={"weight": weight})
        current = train_loop(config, tmp_path / str(weight))
        intra.append(
            class_distances(backbone.embed_images(current.model, current.train.images), current.train.labels)[1]
        )
    assert intra[0] > 1.04 * intra[1] and intra[1] > 1.04 * intra[2]


def test_distances_are_among_the_metrics(tmp_path: Path) -> None:
    where = train.train(SMALL, str(tmp_path / "run"), print)
    model = json.loads((where / run_folder.METRICS).read_bytes())["model"]
    assert model["inter"] > model["intra"] > 0


# ---------------------------------------------------------------------------------------------- single terms


def minimum_margin_of(x: torch.Tensor, labels: torch.Tensor, route: str, centers: torch.Tensor) -> torch.Tensor:
    bank = fm.CenterBank(*centers.shape[::-1])
    bank.centers.copy_(centers)
    made = {"through_update": bank.updated, "batch_means": fm.batch_means}
    rows = centers[labels.unique()] if route == "centers" else made[route](x, labels)[0]
    return fm.minimum_margin_loss(rows, margin=20.0)


@pytest.mark.parametrize("route", ["through_update", "batch_means", "centers"])
@pytest.mark.parametrize("scope", ["batch", "all"])
def test_routes_of_the_minimum_margin(route: str, scope: str) -> None:
    terms = terms_of(minimum_margin=MML | {"route": route, "scope": scope})
    assert terms.bank is not None
    terms.bank.centers.copy_(torch.randn(9, D))
    (x, labels), before = batch(), terms.bank.centers.clone()
    labels %= 7  # two classes are absent
    x.requires_grad_()
    loss = terms(x, labels)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert (x.grad is None) == (route == "centers")
    if scope == "batch":
        torch.testing.assert_close(terms.last["minimum_margin"], minimum_margin_of(x, labels, route, before).detach())
    terms.update(x, labels, lr=0.1)
    ruled = fm.CenterBank(D, 9)
    ruled.centers.copy_(before)
    ruled.update(x, labels)
    if route == "centers":
        trained = before.clone().requires_grad_()
        (1e-3 * fm.minimum_margin_loss(trained, labels, margin=20.0, scope=scope)).backward()  # type: ignore[arg-type]
        assert trained.grad is not None
        torch.testing.assert_close(terms.bank.centers, ruled.centers - 0.1 * trained.grad.to_dense())
        assert (terms.bank.centers[7:] != before[7:]).any() == (scope == "all")
    else:
        assert torch.equal(terms.bank.centers, ruled.centers)


def test_options_of_the_bank_belong_to_center() -> None:
    terms = terms_of(center={"update": "ema", "alpha": 0.25, "reduction": "sum"}, git={})
    assert repr(terms.bank) == f"CenterBank(in_features={D}, num_classes=9, update=ema, alpha=0.25)"
    x, labels = batch()
    terms(x, labels)
    torch.testing.assert_close(terms.last["center"], x.square().sum() / 2)
    assert terms_of(margin_based={}).bank is None


def test_losses_of_pytorch_metric_learning_come_by_their_name() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = batch()
    for name, options in (
        ("ContrastiveLoss", {"neg_margin": 0.7}),
        ("TripletMarginLoss", {"margin": 0.3}),
        ("LiftedStructureLoss", {}),
        ("ProxyNCALoss", {"num_classes": 9, "embedding_size": D}),
    ):
        torch.manual_seed(1)
        terms = terms_of(**{name: options})
        torch.manual_seed(1)
        torch.testing.assert_close(terms(x, labels), getattr(losses, name)(**options)(x, labels))
    assert [name for name, _ in terms.named_parameters()] == ["learned.ProxyNCALoss.proxies"]


def test_lifted_structure_with_a_learned_scale() -> None:
    """DOP 4.2.5, on the formula of the lifted structure paper: the negatives of both rows of each positive pair."""
    pytest.importorskip("pytorch_metric_learning")
    terms = terms_of(LiftedStructureLoss={"scale": 12.0})
    x, labels = batch()
    loss = terms(x, labels)
    assert isinstance(loss, torch.Tensor)
    distance = torch.cdist(12 * F.normalize(x), 12 * F.normalize(x))
    expected = []
    for i, j in itertools.combinations(range(16), 2):
        if labels[i] == labels[j]:
            negatives = [distance[a, labels != labels[a]] for a in (i, j)]
            expected.append((torch.cat(negatives).neg().add(1).logsumexp(0) + distance[i, j]).clamp(min=0) ** 2 / 2)
    torch.testing.assert_close(loss, torch.stack(expected).mean(), rtol=1e-4, atol=1e-4)
    loss.backward()
    (scale,) = terms.parameters()
    assert scale == 12 and scale.grad is not None and scale.grad != 0


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"centre": {}}, ["terms.centre", "center, git, minimum_margin, marginal, range, margin_based"]),
        ({"BaseMetricLoss": {}}, ["terms.BaseMetricLoss", "pytorch_metric_learning"]),
        ({"git": {"pair": "samples"}}, ["terms.git", "pair"]),
        ({"git": {"pairs": "triples"}}, ["terms.git", "triples", "samples"]),
        ({"git": {"reduction": "none"}}, ["terms.git", "a scalar"]),
        ({"center": {"alpha": 2.0}}, ["terms.center", "alpha is 2.0"]),
        ({"center": {"rate": 2.0}}, ["terms.center", "rate"]),
        ({"minimum_margin": {}}, ["terms.minimum_margin", "margin"]),
        ({"minimum_margin": {"margin": -1.0}}, ["terms.minimum_margin", "-1.0"]),
        ({"minimum_margin": {"margin": 9.0, "route": "sideways"}}, ["terms.minimum_margin", "route is 'sideways'"]),
        ({"range": {"margin": "wide"}}, ["terms.range"]),
        ({"margin_based": {"beta": "low"}}, ["terms.margin_based", "low"]),
        ({"TripletMarginLoss": {"marginn": 0.1}}, ["terms.TripletMarginLoss", "marginn"]),
    ],
)
def test_a_mistake_in_a_term_names_it(terms: dict[str, Any], words: list[str]) -> None:
    pytest.importorskip("pytorch_metric_learning")
    with pytest.raises(ValueError) as refusal:
        terms_of(**terms)
    assert [word for word in words if word not in str(refusal.value)] == []


def test_without_pytorch_metric_learning_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    with pytest.raises(ValueError, match=r"terms.TripletMarginLoss: .* pip install 'fastmargin\[pml\]'"):
        terms_of(TripletMarginLoss={})
    assert terms_of(margin_based={}).learned


def calls_of_train(monkeypatch: pytest.MonkeyPatch) -> list[TrainConfig]:
    calls: list[TrainConfig] = []
    monkeypatch.setattr(train, "train", lambda config, *_: calls.append(config))
    return calls


def test_terms_from_file_and_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, file = calls_of_train(monkeypatch), tmp_path / "c.yaml"
    file.write_text("terms:\n  center: {weight: 0.01, options: {alpha: 0.3}}\n  git: {}\n")
    expected = {"center": TermConfig(0.01, {"alpha": 0.3}), "git": TermConfig(1.0)}
    assert cli.main(["train", "--config", str(file)]) == 0
    assert cli.main(["train", "--config", str(file), "--terms.git.weight", "0.5"]) == 0
    arguments = ["--terms.center.weight", "0.01", "--terms.center.options", "{alpha: 0.3}", "--terms.git.weight", "1"]
    assert cli.main(["train", *arguments]) == 0
    assert [config.terms for config in calls] == [expected, expected | {"git": TermConfig(0.5)}, expected]
    where = run_folder.claim(str(tmp_path / "run"), calls[0])
    assert run_folder.read_config(where) == calls[0]
    assert cli.main(["train", "--config", str(where / run_folder.CONFIG)]) == 0 and calls[-1] == calls[0]
    with pytest.raises(ValueError, match="another configuration: terms"):
        run_folder.check(where, calls[1])
    for wrong, word in (
        (["--terms.git.weight", "-1"], "terms.git.weight is -1.0"),
        (["--terms.git.weight", "much"], "weight"),
        (["--terms", "3"], "terms"),
    ):
        assert cli.main(["train", *wrong]) == cli.MISTAKE and word in capsys.readouterr().err


@pytest.mark.parametrize("terms", [3, None, {"git": 3}, {"git": {"options": None}}, {"git": {"wait": 1}}])
def test_spoilt_terms_of_a_run(tmp_path: Path, terms: object) -> None:
    (tmp_path / run_folder.CONFIG).write_text(json.dumps({"terms": terms}))
    with pytest.raises(ValueError, match="not the configuration of a run"):
        run_folder.read_config(tmp_path)
