"""Analysis and plans: effects against brute force, budgets met, edits carried out or refused."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import slr_gpu
from slr_gpu.analysis import predicted_effect
from slr_gpu.budget import MULTIPLY_ADDS_A_VALUE, LayerCost
from slr_gpu.calibration import as_batches
from slr_gpu.cli import app
from slr_gpu.fold import for_deployment
from slr_gpu.frontier import Frontier
from slr_gpu.layer_seconds import random_layer
from slr_gpu.output_loss import mean_loss
from slr_gpu.plan import LayerPlan


class Network(nn.Module):
    """A residual sum, an in-place activation and a functional one."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 10, 3, padding=1)
        self.a, self.norm = nn.Conv2d(10, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.relu = nn.ReLU(inplace=True)
        self.b = nn.Conv2d(12, 12, 3, padding=1)
        self.c, self.head = nn.Linear(12, 16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.relu(self.stem(x))
        x = self.relu(self.norm(self.a(x)))
        x = self.relu(self.b(x) + x)
        return self.head(F.relu(self.c(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Network().eval()
    model.norm.running_mean.normal_()
    return model


@pytest.fixture(scope="module")
def data():
    coarse = torch.randn(120, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(coarse, scale_factor=2, mode="bilinear")


@pytest.fixture(scope="module")
def analysis(model, data):
    return slr_gpu.analyze(model, data, samples=1500, progress=False)


def same(first, second):
    return all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_compress_is_analyze_allocate_apply(model, data, analysis, tmp_path):
    before = copy.deepcopy(model.state_dict())
    plan = analysis.allocate({"flops": 0.4})
    plan.save(tmp_path / "plan.json")
    plan = slr_gpu.Plan.load(tmp_path / "plan.json")
    applied = slr_gpu.apply(model, data, plan, progress=False)
    whole = slr_gpu.compress(model, data, {"flops": 0.4}, samples=1500, progress=False)
    assert same(applied.model, whole.model)
    assert whole.report.settings["allocation"] == "output" and analysis.loss == "kl"
    assert whole.report.achieved["flops"] <= 0.4
    # What was predicted is what was built, on all layers.
    assert whole.report.achieved == pytest.approx(plan.achieved, rel=1e-3)
    built = {row.name: row.structure for row in whole.report.layers if row.compressed}
    planned = {x.name: str(x.structure) for x in plan.layers if x.form != "dense"}
    assert built == planned
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("allocation", ["output", "response"])
def test_one_analysis_serves_many_budgets(analysis, allocation):
    fractions = np.linspace(0.15, 1.0, 10)
    plans = [analysis.allocate({"flops": float(f)}, allocation) for f in fractions]
    for fraction, plan in zip(fractions, plans, strict=True):
        assert plan.achieved["flops"] <= fraction * (1 + 1e-9)
    totals = [sum(layer.loss for layer in plan.layers) for plan in plans]
    assert all(b <= a * (1 + 1e-9) for a, b in zip(totals, totals[1:], strict=False))
    assert {layer.form for layer in plans[-1].layers} == {"dense"}
    both = analysis.allocate({"flops": 0.4, "params": 0.5}, allocation)
    assert both.achieved["flops"] <= 0.4 and both.achieved["params"] <= 0.5


def test_effects_are_those_of_one_layer_replaced(model, data, analysis):
    """Every layer's effect, measured anew on a copy of the user's model with that layer alone."""
    held = data[9::10]
    with torch.no_grad():
        wanted = model(held)
    for layer in analysis.layers:
        assert 2 <= len(layer.effects) <= 3
        errors = [error for error, _ in layer.effects]
        assert errors == sorted(errors, reverse=True)
        assert all(loss >= 0 for _, loss in layer.effects)
        # With almost nothing left, that layer's error is large, and so is the effect.
        assert layer.effects[0][1] > layer.effects[-1][1]
    # The smallest error by brute force: the point's structure fitted alone to the original.
    plans = []
    for layer in analysis.layers:
        error, loss = layer.effects[0]
        point = min(layer.points, key=lambda p, e=error: abs(p.error - e))
        s = point.structure
        entries = [
            LayerPlan(other.cost.name, "dense")
            if other is not layer
            else LayerPlan(layer.cost.name, s.form, s.r, s.s, s.k)
            for other in analysis.layers
        ]
        settings = analysis.settings | {"solver": {"name": "majorize", "iterations": 0}}
        plan = slr_gpu.Plan({}, "by hand", settings, entries)
        plans.append(plan)
        result = slr_gpu.apply(model, data, plan, progress=False).model
        with torch.no_grad():
            by_hand = mean_loss("kl", [wanted], [result(held)])
        # The fit refines the basis and the ridge beyond the closed form that was measured.
        assert by_hand == pytest.approx(loss, rel=0.5)


class Branching(Network):
    def forward(self, x):
        if float(x.sum()) > 1e9:
            return x
        return super().forward(x)


def test_outputs_with_a_replaced_layer(model, data):
    batches = as_batches(data, model, 50)
    other = Branching().eval()
    other.load_state_dict(model.state_dict())
    for network, traced in ((model, True), (other, False)):
        frontier = Frontier(network, batches, ["a", "b", "c"])
        assert frontier.traced == traced
        for name in ("a", "b", "c"):
            changed = copy.deepcopy(network)
            with torch.no_grad():
                changed.get_submodule(name).weight.mul_(0.5)
            inputs = [x.clone() for _, x in frontier.inputs(name)]
            found = list(frontier.outputs(name, changed.get_submodule(name)))
            with torch.no_grad():
                for (batch,), got in zip(batches, found, strict=True):
                    torch.testing.assert_close(got, changed(batch))
            # The frontier itself is where it was, and the model as it was.
            again = [x for _, x in frontier.inputs(name)]
            assert all(torch.equal(x, y) for x, y in zip(inputs, again, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(network(data), model(data))


def test_eval_fn_is_asked_instead(model, data):
    seen = []

    def evaluate(changed):
        with torch.no_grad():
            seen.append(float(-(changed(data) - model(data)).square().mean()))
        return seen[-1]

    analysis = slr_gpu.analyze(model, data, samples=800, eval_fn=evaluate, progress=False)
    assert analysis.loss == "eval_fn" and abs(seen[0]) < 1e-6
    effects = [loss for layer in analysis.layers for _, loss in layer.effects]
    assert effects == pytest.approx([seen[0] - value for value in seen[1:]])
    assert max(effects) > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_effects_must_be_finite(model, data, value):
    answers = iter([1.0])  # of the dense model
    with pytest.raises(slr_gpu.ModelError, match="eval_fn of .* with a compressed"):
        slr_gpu.analyze(model, data, eval_fn=lambda m: next(answers, value), progress=False)


def test_predicted_effects():
    effects = [(0.2, 0.05), (0.01, 0.001), (0.05, 0.01)]
    errors = np.array([0.01, 0.05, 0.2])
    np.testing.assert_allclose(predicted_effect(effects, errors), [0.001, 0.01, 0.05])
    grid = np.geomspace(1e-6, 1, 50)
    assert np.all(np.diff(predicted_effect(effects, grid)) > 0)
    assert predicted_effect(effects, np.zeros(1)) == 0
    # A power law is continued as one.
    law = [(e, 3 * e**1.5) for e in (0.3, 0.03)]
    np.testing.assert_allclose(predicted_effect(law, grid), 3 * grid**1.5, rtol=1e-9)
    # Measured noise (less error, more loss; nothing lost) leaves it monotone.
    noisy = [(0.1, 0.0), (0.01, 1e-4), (0.5, 5e-5)]
    assert np.all(np.diff(predicted_effect(noisy, grid)) >= 0)


def traffic(layer, example):
    """Values that the convolutions and linear layers of a deployed layer read and write."""
    values = 0

    def count(part, inputs, output):
        nonlocal values
        values += inputs[0].numel() + output.numel()

    parts = [m for m in layer.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    handles = [part.register_forward_hook(count) for part in parts]
    layer(example)
    for handle in handles:
        handle.remove()
    return values


@torch.no_grad()
@pytest.mark.parametrize(
    "structure",
    [
        slr_gpu.Structure("rotated", 8, 4, 14),
        slr_gpu.Structure("rotated", 0, 4, 14),
        slr_gpu.Structure("rotated", 14, 0, 14),
        slr_gpu.Structure("columns", 0, 6),
    ],
    ids=str,
)
def test_work_counts_what_the_deployed_layer_does(structure):
    dense = nn.Conv2d(20, 24, 3)
    cost = LayerCost("", 24, 20, 9, 49, 81, (3, 3))
    deployed = for_deployment(nn.Sequential(random_layer(dense, structure)), {"0": "split"}).eval()
    moved = traffic(deployed, torch.zeros(1, 20, 9, 9))
    if structure.r is not None and structure.s and structure.k:
        moved -= 20 * 81  # the two halves of the basis read the same
    if structure.s and structure.k:
        moved += 24 * 49  # the sum reads what U wrote
    expected = cost.cost(structure, "flops") + MULTIPLY_ADDS_A_VALUE * moved
    assert cost.work(structure) == pytest.approx(expected)
    assert cost.work(None) == 20 * 24 * 9 * 49 + MULTIPLY_ADDS_A_VALUE * (20 * 81 + 24 * 49)


def test_of_plans_alike_the_one_of_less_work(analysis):
    def summed(plan):
        costs = {layer.cost.name: layer.cost for layer in analysis.layers}
        work = sum(costs[layer.name].work(layer.structure) for layer in plan.layers)
        return work, sum(layer.loss for layer in plan.layers)

    saved = []
    for fraction in (0.25, 0.35, 0.5):
        work, loss = summed(analysis.allocate({"flops": fraction}))
        least_work, least = summed(analysis.allocate({"flops": fraction}, tolerance=0))
        assert least * (1 - 1e-9) <= loss <= 1.08 * least * (1 + 1e-9)
        assert work <= least_work
        saved.append(1 - work / least_work)
        between = summed(analysis.allocate({"flops": fraction}, tolerance=0.02))
        assert between[1] <= 1.02 * least * (1 + 1e-9)
        assert work <= between[0] <= least_work
    assert max(saved) > 0.005


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf"), "some"])
def test_a_tolerance_is_a_fraction(analysis, tolerance):
    with pytest.raises(slr_gpu.InputError, match="tolerance=.*; expected a fraction >= 0"):
        analysis.allocate({"flops": 0.25}, tolerance=tolerance)


@pytest.mark.parametrize("fraction", [0.15, 0.25, 0.35])
def test_parameters_alone_are_spent_on_the_least_loss(analysis, monkeypatch, fraction):
    plan = analysis.allocate({"params": fraction})
    # FLOPs that nobody could run out of change what is asked, not what can be had.
    rival = analysis.allocate({"params": fraction, "flops": 1.0})
    loss, other = (sum(layer.loss for layer in p.layers) for p in (plan, rival))
    assert loss <= other * (1 + 1e-9)
    monkeypatch.setattr("slr_gpu.analysis._plainer", None)
    assert analysis.allocate({"params": fraction}).as_dict() == plan.as_dict()


def test_unreachable_budgets_name_the_smallest(model, data, analysis):
    with pytest.raises(slr_gpu.BudgetError, match="at least 0") as caught:
        analysis.allocate({"flops": 0.001})
    smallest = float(str(caught.value).split("at least ")[1].split()[0])
    assert analysis.allocate({"flops": smallest + 1e-4}).achieved["flops"] <= smallest + 1e-4
    with pytest.raises(slr_gpu.BudgetError, match="at least"):
        analysis.allocate({"flops": smallest - 1e-3})
    with pytest.raises(slr_gpu.BudgetError, match="at least"):
        slr_gpu.compress(model, data, {"params": 0.001}, progress=False)


def test_overrides_hold_in_a_plan(model, data):
    run = {"samples": 800, "overrides": {"b": {"keep": 0.2}, "a": {"form": "channels"}}}
    analysis = slr_gpu.analyze(model, data, progress=False, **run)
    for fraction in (0.5, 0.9):
        layers = {x.name: x for x in analysis.allocate({"flops": fraction}).layers}
        assert layers["b"].share["flops"] <= 0.2
        assert layers["a"].form in ("channels", "dense")


def test_an_analysis_comes_back_from_disk(analysis, tmp_path):
    analysis.save(tmp_path / "analysis.json")
    again = slr_gpu.Analysis.load(tmp_path / "analysis.json")
    keep = {"flops": 0.3}
    assert again.allocate(keep).as_dict() == analysis.allocate(keep).as_dict()
    with pytest.raises(slr_gpu.InputError, match="made for 'output'"):
        analysis.allocate(keep, "pca_energy")
    with pytest.raises(slr_gpu.InputError, match="one of uniform"):
        analysis.allocate(keep, "random")
    value = json.loads((tmp_path / "analysis.json").read_text())
    for broken, match in (({**value, "schema": 9}, "schema"), ({"schema": 1}, "KeyError")):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(slr_gpu.InputError, match=match):
            slr_gpu.Analysis.load(tmp_path / "broken.json")


def test_solvers_with_structures_of_their_own(model, data):
    with pytest.raises(slr_gpu.InputError, match="chooses its own structures"):
        slr_gpu.analyze(model, data, solver=slr_gpu.Zhang(), progress=False)
    result = slr_gpu.compress(
        model, data, {"flops": 0.5}, solver=slr_gpu.Zhang(), samples=600, progress=False
    )
    assert result.report.settings["allocation"] == "uniform"


def test_edits_are_carried_out(model, data, analysis, tmp_path):
    value = analysis.allocate({"flops": 0.4}).as_dict()
    layers = {layer["name"]: layer for layer in value["layers"]}
    layers["a"].update(form="dense")
    layers["b"].update(form="rotated", r=5, s=2, k=3)
    layers["c"].update(form="columns", s=4, k=2, r=None)
    value["layers"][2] = {k: v for k, v in layers["c"].items() if v is not None}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    result = slr_gpu.apply(model, data, slr_gpu.Plan.load(tmp_path / "plan.json"), progress=False)
    rows = {row.name: row for row in result.report.layers}
    assert rows["a"].reason == "dense in the plan"
    assert rows["b"].structure == "rotated r=5 s=2 k=3"
    assert rows["c"].structure == "columns s=4 k=2"
    # The plan of the result is a plan again, and with it the model is loaded.
    result.save(tmp_path / "out")
    assert same(slr_gpu.load(tmp_path / "out", Network), result.model)
    again = slr_gpu.apply(
        model, data, slr_gpu.Plan.load(tmp_path / "out/plan.json"), progress=False
    )
    assert same(again.model, result.model)


@pytest.mark.parametrize(
    "edit,match",
    [
        (lambda p: p.update(schema=1), "schema 2"),
        (lambda p: p.pop("layers"), "layers=None"),
        (lambda p: p["layers"].append(p["layers"][0]), "twice"),
        (lambda p: p["layers"][0].pop("name"), "an object with a name"),
        (lambda p: p["layers"][0].update(rank=3), "with rank"),
        (lambda p: p["layers"][0].update(form="diagonal"), "form='diagonal'"),
        (lambda p: p["layers"][0].update(form="auto"), "auto with limits"),
        (lambda p: p["layers"][0].update(form="rotated", r=3, s=1, k=2.5), "k=2.5"),
        (lambda p: p["layers"][0].update(form="rotated", r=3, s=0, k=0), "s=0 and k=0"),
        (lambda p: p["layers"][0].update(form="auto", limits={"flops": -1}), "positive numbers"),
        (lambda p: p["layers"][0].update(form="columns", limits={}), "positive numbers"),
        (lambda p: p["layers"][-1].update(form="auto", limits={"params": 0.5}), "smallest"),
        (lambda p: p["layers"][-1].update(form="rotated", r=2, s=1, k=1), "without a spatial"),
        (lambda p: p["layers"][0].update(form="rotated", r=11, s=1, k=2), r"r=11.*\[1, 10\]"),
        (lambda p: p["layers"][0].update(form="rotated", r=3, s=4, k=2), r"s=4.*\[0, 3\]"),
        (lambda p: p["layers"][0].update(form="rotated", r=1, s=0, k=10), r"k=10.*\[0, 9\]"),
        (lambda p: p["layers"][0].update(form="columns", r=3, s=4, k=2), "r with rotated"),
        (lambda p: p["layers"][0].update(name="stem", form="columns", s=1, k=1), "first layer"),
        (
            lambda p: p["layers"][0].update(name="nothing", form="columns", s=1, k=1),
            "no such layer",
        ),
        (lambda p: p["settings"].update(sample=3), "settings that do not work"),
        (lambda p: p["settings"].update(solver={"name": "magic"}), "settings that do not work"),
    ],
)
def test_edits_that_cannot_be_carried_out(model, data, analysis, tmp_path, edit, match):
    value = json.loads(json.dumps(analysis.allocate({"flops": 0.4}).as_dict()))
    value["layers"][0] = {"name": "a", "form": "dense"}
    edit(value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(slr_gpu.InputError, match=match):
        plan = slr_gpu.Plan.load(tmp_path / "plan.json")
        slr_gpu.apply(model, data, plan, progress=False)


@pytest.mark.parametrize("allocation", ["output", "uniform"])
def test_pictures(analysis, tmp_path, allocation):
    pytest.importorskip("matplotlib")
    plan = analysis.allocate({"flops": 0.4}, allocation)
    for name, start in (("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")):
        plan.plot(tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(slr_gpu.InputError, match=r"ends in \.png"):
        plan.plot(tmp_path / "plan.txt")


CLI_MODEL = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(432, 5),
    )
"""


def test_command_line(tmp_path, monkeypatch):
    (tmp_path / "plan_model.py").write_text(CLI_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    import plan_model

    torch.manual_seed(0)
    save_file(plan_model.make().state_dict(), "w.safetensors")
    np.save("calib.npy", np.random.default_rng(0).normal(size=(60, 2, 6, 6)))
    inputs = ["--model", "plan_model:make", "--weights", "w.safetensors", "--data", "calib.npy"]

    def run(*arguments):
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.output

    run("analyze", *inputs, "--out", "measured", "--keep", "flops=0.6", "--samples", "700")
    assert sorted(p.name for p in (tmp_path / "measured").iterdir()) == [
        "analysis.json",
        "plan.json",
    ]
    shown = run("allocate", "measured/analysis.json", "--keep", "flops=0.4", "--out", "p.json",
                "--picture", "p.svg")  # fmt: skip
    assert "predicted of the whole model" in shown and (tmp_path / "p.svg").exists()
    plans = []
    for tolerance in ("0", "0.5"):
        path = f"t{tolerance}.json"
        run("allocate", "measured/analysis.json", "--keep", "flops=0.4", "--out", path,
            "--tolerance", tolerance)  # fmt: skip
        plans.append(json.loads((tmp_path / path).read_text()))
    least, plainer = (sum(layer["loss"] for layer in plan["layers"]) for plan in plans)
    assert least < plainer <= 1.5 * least * (1 + 1e-9)
    run("apply", *inputs, "--plan", "p.json", "--out", "applied")
    report = json.loads((tmp_path / "applied" / "report.json").read_text())
    assert report["achieved"]["flops"] <= 0.4
    run("compress", *inputs, "--keep", "flops=0.4", "--samples", "700", "--out", "whole")
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        "model.safetensors", "plan.json", "report.json",
    ]  # fmt: skip
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("applied", "whole")]
    assert files[0] == files[1]
    done = CliRunner().invoke(app, ["allocate", "measured/analysis.json", "--keep", "flops=0.001",
                                    "--out", "q.json"])  # fmt: skip
    assert done.exit_code == 1 and "at least" in done.output and not (tmp_path / "q.json").exists()
