"""Random small networks for hypothesis: a plan of steps, and the module that carries it out.

A plan is made of plain values, so a failing one prints whole and shrinks. Every step knows the
shape that it is applied to, so whatever is drawn runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODULES = {
    "ReLU": nn.ReLU,
    "in-place ReLU": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "Hardswish": nn.Hardswish,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "ELU": nn.ELU,
    "PReLU": nn.PReLU,
}
FUNCTIONS = {
    "relu": F.relu,
    "relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.05),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "hardtanh": lambda x: F.hardtanh(x, -2.0, 0.5),
    "softmax": lambda x: torch.softmax(x, 1),
    "swish": lambda x: x * torch.sigmoid(x),
    "twice": lambda x: x + torch.tanh(x),
}
FORMS = ["auto", "auto", "auto", "columns", "channels", "rotated", "spatial"]


@dataclass
class Plan:
    """A network, its inputs and what is asked of it."""

    shape: tuple[int, ...]  # of one sample, channels first
    steps: list[dict[str, Any]]
    head: list[dict[str, Any]]
    pooled: bool
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


class Network(nn.Module):
    """Carries a plan out."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.dims = len(plan.shape) - 1
        self.steps = nn.ModuleList(_module(step, self.dims) for step in plan.steps)
        self.head = nn.ModuleList(_module(step, 0) for step in plan.head)

    def forward(self, x):
        for step, module in zip(self.plan.steps, self.steps, strict=True):
            x = _apply(step, module, x)
        if self.dims and self.plan.pooled:
            x = x.mean(tuple(range(2, self.dims + 2)))
        elif self.dims:
            x = x.flatten(1)
        for step, module in zip(self.plan.head, self.head, strict=True):
            x = _apply(step, module, x)
        return x


def network(plan: Plan) -> Network:
    """The same network every time, with running statistics of its own inputs."""
    torch.manual_seed(plan.seed)
    model = Network(plan)
    with torch.no_grad():
        model.train()(inputs(plan, 16))
    return model.eval()


def inputs(plan: Plan, count: int) -> torch.Tensor:
    return torch.randn(count, *plan.shape, generator=torch.Generator().manual_seed(plan.seed + 1))


def _module(step: dict[str, Any], dims: int) -> nn.Module:
    kind, settings = step["kind"], step.get("settings", {})
    if kind in ("conv", "residual", "concat", "again"):
        module: nn.Module = CONVS[dims](**settings)
    elif kind in ("linear", "residual linear"):
        module = nn.Linear(**settings)
    elif kind == "norm":
        module = (NORMS[dims] if dims else nn.BatchNorm1d)(settings["channels"])
        nn.init.uniform_(module.weight, 0.5, 1.5)
    elif kind == "group norm":
        module = nn.GroupNorm(1, settings["channels"])
    elif kind == "module":
        module = MODULES[settings["name"]]()
    elif kind == "dropout":
        module = nn.Dropout(0.3)
    else:
        module = nn.Identity()
    parametrized = {"weight_norm": nn.utils.parametrizations.weight_norm}
    return parametrized[step["norm"]](module) if step.get("norm") else module


def _apply(step: dict[str, Any], module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    kind = step["kind"]
    if kind in ("residual", "residual linear"):
        return x + module(x)
    if kind == "concat":
        return torch.cat([x, module(x)], 1)
    if kind == "again":
        return module(torch.tanh(module(x)))
    if kind == "function":
        return FUNCTIONS[step["settings"]["name"]](x)
    if kind == "pool":
        dims = x.ndim - 2
        pools = {
            "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
            "avg": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
        }
        return pools[step["settings"]["name"]][dims - 1](x, 2, ceil_mode=True)
    return module(x)


# -- drawing -------------------------------------------------------------------------------------


@st.composite
def plans(draw) -> Plan:
    dims = draw(st.sampled_from([2, 2, 1, 3, 0]))
    largest = {0: 0, 1: 16, 2: 8, 3: 5}[dims]
    sizes = [draw(st.integers(3, largest)) for _ in range(dims)]
    width = draw(st.integers(2, 10))
    shape = (width, *sizes)
    steps = []
    for _ in range(draw(st.integers(1, 5)) if dims else 0):
        step, width, sizes = draw(_step(dims, width, sizes))
        steps.append(step)
    pooled = draw(st.booleans())
    for size in () if pooled else sizes:
        width *= size
    head = []
    for _ in range(draw(st.integers(1, 3))):
        step, width = draw(_head(width))
        head.append(step)
    return Plan(shape, steps, head, pooled, draw(_options()), draw(st.integers(0, 3)))


@st.composite
def _step(draw, dims: int, width: int, sizes: list[int]):
    kind = draw(
        st.sampled_from(
            ["conv", "conv", "conv", "residual", "concat", "again", "norm", "norm", "group norm"]
            + ["module", "module", "function", "function", "pool", "dropout"]
        )
    )
    settings: dict[str, Any] = {}
    if kind == "pool" and min(sizes) == 1:
        kind = "dropout"
    if kind in ("norm", "group norm"):
        settings = {"channels": width}
    elif kind == "module":
        settings = {"name": draw(st.sampled_from(sorted(MODULES)))}
    elif kind == "function":
        settings = {"name": draw(st.sampled_from(sorted(FUNCTIONS)))}
    elif kind == "pool":
        settings = {"name": draw(st.sampled_from(["max", "avg"]))}
        sizes = [-(-size // 2) for size in sizes]
    elif kind != "dropout":
        kernel = [draw(st.integers(1, min(3, size))) for size in sizes]
        settings = {"in_channels": width, "kernel_size": tuple(kernel), "bias": draw(st.booleans())}
        out = width
        if kind == "conv":
            dilation = [
                draw(st.integers(1, 2)) if 2 * (k - 1) < size else 1
                for k, size in zip(kernel, sizes, strict=True)
            ]
            stride = [draw(st.integers(1, 2)) for _ in sizes]
            padding = [draw(st.integers(0, k - 1)) for k in kernel]
            settings |= {
                "dilation": tuple(dilation),
                "stride": tuple(stride),
                "padding": tuple(padding),
            }
            spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
            sizes = [
                (size + 2 * p - span) // s + 1
                for size, p, span, s in zip(sizes, padding, spans, stride, strict=True)
            ]
            out = draw(st.integers(1, 12))
        else:
            settings["padding"] = "same"
            if kind == "concat":
                out = draw(st.integers(1, 6))
        divisors = [g for g in range(1, width + 1) if width % g == 0]
        groups = draw(st.sampled_from([1, 1, 1, *divisors]))
        if kind in ("conv", "concat"):
            out = groups * -(-out // groups)
        settings |= {"out_channels": out, "groups": groups}
        if kind == "concat":
            width += out
        elif kind == "conv":
            width = out
        modes = ["zeros", "zeros", "zeros", "replicate", "circular"]
        settings["padding_mode"] = draw(st.sampled_from(modes))
    step = {"kind": kind, "settings": settings}
    if kind == "conv" and draw(st.integers(0, 7)) == 0:
        step["norm"] = "weight_norm"
    return step, width, sizes


@st.composite
def _head(draw, width: int):
    kind = draw(
        st.sampled_from(["linear", "linear", "linear", "residual linear", "module", "norm"])
    )
    if kind == "linear":
        out = draw(st.integers(1, 12))
        settings = {"in_features": width, "out_features": out, "bias": draw(st.booleans())}
        return {"kind": kind, "settings": settings}, out
    if kind == "residual linear":
        settings = {"in_features": width, "out_features": width}
    elif kind == "module":
        settings = {"name": draw(st.sampled_from(sorted(MODULES)))}
    else:
        settings = {"channels": width}
    return {"kind": kind, "settings": settings}, width


@st.composite
def _options(draw) -> dict[str, Any]:
    fraction = st.floats(0.2, 1.0).map(lambda f: round(f, 3))
    resources = draw(st.sampled_from([["flops"], ["flops"], ["params"], ["params", "flops"]]))
    return {
        "keep": {resource: draw(fraction) for resource in resources},
        "form": draw(st.sampled_from(FORMS)),
        "keep_ends": draw(st.sampled_from([False, False, True])),
        "asymmetric": draw(st.sampled_from([True, True, False])),
        "allocation": draw(st.sampled_from([None, None, "response", "uniform", "pca_energy"])),
        "multiple": draw(st.sampled_from([1, 2, 16])),
    }
