"""Activations: slopes, the convex surrogate and the majoriser against their definitions."""

import numpy as np
import pytest
import torch

from slr_gpu import activations
from slr_gpu.errors import InputError
from slr_gpu.ops import NumpyOps

OPS = NumpyOps()
ALL = [
    "identity", "relu", "relu6", "clamp(-0.5,2)", "leaky_relu(0.2)", "sigmoid", "tanh", "silu",
    "gelu", "gelu_tanh", "hardswish",
]  # fmt: skip
TORCH = {
    "identity": lambda z: z,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "clamp(-0.5,2)": lambda z: torch.clamp(z, -0.5, 2),
    "leaky_relu(0.2)": lambda z: torch.nn.functional.leaky_relu(z, 0.2),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda z: torch.nn.functional.gelu(z, approximate="tanh"),
    "hardswish": torch.nn.functional.hardswish,
}
KINKS = np.array([-3.0, -0.5, 0.0, 2.0, 3.0, 6.0])


def losses(activation, z, y, convex=False):
    """Elementwise loss and residual through the one public door, `masked_gradient`."""
    R = OPS.masked_gradient(z[None, :, None], y[None, :, None], activation, convex=convex)[0]
    each = [
        OPS.masked_gradient(
            np.full((1, 1, 1), a), np.full((1, 1, 1), b), activation, convex=convex
        )[1][0]
        for a, b in zip(z, y, strict=True)
    ]
    return np.array(each), R[0, :, 0]


def targets(activation, rng, count):
    """Targets in the range of the activation, some of them at its ends."""
    return activation.value(OPS, rng.normal(scale=3.0, size=count))


def test_every_name_is_covered():
    assert {activations.get(name).name.split("(")[0] for name in ALL} | {"relu6"} == set(
        activations.names()
    )


@pytest.mark.parametrize("name", ALL)
def test_values_are_those_of_torch(name):
    z = np.linspace(-8, 8, 401)
    expected = TORCH[name](torch.from_numpy(z)).numpy()
    value = activations.get(name).value(OPS, z)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ALL)
def test_dtype_is_kept(name, dtype):
    activation, z = activations.get(name), np.linspace(-8, 8, 9, dtype=dtype)
    assert activation.value(OPS, z).dtype == dtype
    assert activation.slope(OPS, z).dtype == dtype


@pytest.mark.parametrize("name", ALL)
def test_slopes_against_finite_differences(name):
    activation, h = activations.get(name), 1e-5
    z = np.linspace(-8, 8, 403)
    z = z[np.abs(z[:, None] - KINKS).min(axis=1) > 2 * h]
    numeric = (activation.value(OPS, z + h) - activation.value(OPS, z - h)) / (2 * h)
    np.testing.assert_allclose(activation.slope(OPS, z), numeric, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in ALL if activations.get(n).has_convex_surrogate])
def test_surrogate_is_an_upper_bound_and_zero_at_the_source(name):
    activation, rng = activations.get(name), np.random.default_rng(0)
    y = targets(activation, rng, 400)
    z = rng.normal(scale=3.0, size=400)
    true, _ = losses(activation, z, y)
    surrogate, _ = losses(activation, z, y, convex=True)
    assert np.all(surrogate >= true - 1e-12)
    # And it is zero at the response that the target came from.
    np.testing.assert_allclose(losses(activation, z, activation.value(OPS, z), True)[0], 0)


@pytest.mark.parametrize("name", ["identity", "relu", "relu6", "clamp(-0.5,2)", "leaky_relu(0.2)"])
def test_surrogate_is_convex_along_segments(name):
    activation, rng = activations.get(name), np.random.default_rng(1)
    y = targets(activation, rng, 500)
    a, b, w = rng.normal(scale=3.0, size=500), rng.normal(scale=3.0, size=500), rng.random(500)
    ends = w * losses(activation, a, y, True)[0] + (1 - w) * losses(activation, b, y, True)[0]
    assert np.all(losses(activation, w * a + (1 - w) * b, y, True)[0] <= ends + 1e-12)


def test_true_relu_loss_is_not_convex():
    """The counterexample to the paper's claim about its problem (3)."""
    relu = activations.get("relu")
    loss, _ = losses(relu, np.array([-1.0, 0.0, 1.0]), np.ones(3))
    assert loss[1] == 1 > (loss[0] + loss[2]) / 2 == 0.5


@pytest.mark.parametrize("convex", [False, True])
@pytest.mark.parametrize("name", [n for n in ALL if activations.get(n).exact])
def test_majoriser_of_exact_activations(name, convex):
    activation, rng = activations.get(name), np.random.default_rng(2)
    y = targets(activation, rng, 3000)
    z, at = rng.normal(scale=4.0, size=3000), rng.normal(scale=4.0, size=3000)
    loss_at, R = losses(activation, at, y, convex)
    bound = loss_at - 2 * R * (z - at) + activation.curvature * (z - at) ** 2
    assert np.all(losses(activation, z, y, convex)[0] <= bound + 1e-10)


@pytest.mark.parametrize(
    "bad",
    ["", "swish", "relu(1)", "leaky_relu(x)", "leaky_relu(1.5)", "leaky_relu(-0.1)",
     "clamp(2,1)", "clamp(1)", "relu)", None, 3],
)  # fmt: skip
def test_unknown_names_and_bad_parameters(bad):
    with pytest.raises(InputError, match="got .*; expected"):
        activations.get(bad)


def test_names_round_trip():
    for name in ALL:
        activation = activations.get(name)
        assert activations.get(activation.name).name == activation.name
        assert activations.get(activation) is activation
