"""Whatever network is drawn: the result runs, within its budget, and is what the report says."""

from __future__ import annotations

import re
import tempfile

import torch
from hypothesis import HealthCheck, assume, given, settings
from random_networks import Plan, inputs, network, plans
from test_architectures import check_counts

import slr_gpu
from slr_gpu.fold import decomposed_layers, deployable, for_deployment, graphs_of

COUNT, SAMPLES = 24, 150


def compressed(plan: Plan) -> slr_gpu.Result:
    """The result; where the budget is too small, for the smallest that the error names."""
    model, data = network(plan), inputs(plan, COUNT)
    options = {**plan.options, "samples": SAMPLES, "progress": False}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2 * len(options["keep"])):
        try:
            result = slr_gpu.compress(model, data, **options)
            break
        except slr_gpu.BudgetError as error:
            found = re.search(r"keep={'(\w+)': .* at least ([\d.]+) for this model", str(error))
            assert found, error
            options["keep"] = {**options["keep"], found[1]: float(found[2])}
        except slr_gpu.InputError as error:
            assume("without a layer to compress" not in str(error))
            raise
    else:
        raise AssertionError(f"the smallest budget is refused too: {options['keep']}")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for resource, fraction in options["keep"].items():
        assert result.report.achieved[resource] <= fraction + 1e-9
    return result


def check_deployment(model: torch.nn.Module, data: torch.Tensor) -> None:
    """Whatever graphs its layers take, it computes the same."""
    model, data = deployable(model).double(), data.double()
    layers = decomposed_layers(model)
    with torch.no_grad():
        wanted = model(data)
        for number in range(3):
            graphs = {name: graphs_of(layer)[number:][:1] for name, layer in layers.items()}
            chosen = {name: left[0] for name, left in graphs.items() if left}
            got = for_deployment(model, chosen)(data)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-7 * scale)


@settings(
    max_examples=300,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(plans())
def test_random_networks(plan):
    result = compressed(plan)
    data = inputs(plan, 5)
    with torch.no_grad():
        got = result.model(data)
        assert got.shape == network(plan)(data).shape and torch.isfinite(got).all()
    check_counts(result.report, result.model, (data[:1],))
    check_deployment(result.model, data)
    with tempfile.TemporaryDirectory() as folder:
        result.save(folder)
        again = slr_gpu.load(folder, lambda: network(plan))
    with torch.no_grad():
        assert torch.equal(again(data), got)
