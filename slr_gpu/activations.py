"""One record per activation: everything the project knows about it is in its entry here.

In: pre-activation responses z and target responses y = r(z_original), elementwise. Out: the
quantities from which every objective of the package is made,

    error e = y - v,   loss = e**2,   residual R = s * e = -1/2 d loss / d z,

where for the true loss v = r(z) and s = r'(z). For the piecewise linear activations there is
also the convex upper bound l_c of DESIGN 3.1: wherever `linear_where(z, y)` holds the response
is continued linearly (v = z, s = 1). For ReLU that is (y - z)**2 where y > 0 and max(z, 0)**2
where y = 0; unlike the loss itself, it is convex with a 2-Lipschitz gradient.

`curvature` is c with  loss(z) <= loss(z_k) - 2 R (z - z_k) + c (z - z_k)**2 : exactly 1 for ReLU
and clamps with targets in their range, an estimate elsewhere (solvers then check descent).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import InputError, complain

Array = Any


class Piece(NamedTuple):
    """``r(z) = slope * z + offset`` on [low, high]."""

    low: float
    high: float
    slope: float
    offset: float


@dataclass(frozen=True)
class Activation:
    """An elementwise activation r.

    Attributes
    ----------
    name : str
        Canonical name, parameters included, e.g. ``"leaky_relu(0.01)"``.
    value, slope : callable
        ``value(ops, z)`` and ``slope(ops, z)``, elementwise on arrays of `ops`.
    cuda_value, cuda_slope : str
        The same as C expressions in a variable ``z`` of type ``T``.
    linear_where : callable or None
        ``linear_where(z, y)`` is the mask where the convex surrogate is continued linearly;
        None when the activation has no such surrogate.
    cuda_linear_where : str
        The same as a C expression in ``z`` and ``y``.
    curvature : float
        Curvature of the majoriser, see the module's text.
    exact : bool
        Whether `curvature` is a proven bound where targets are in the `range`, so that descent
        needs no safeguard.
    pieces : tuple of Piece
        Of a continuous piecewise linear activation, covering the real line; else empty.
    """

    name: str
    value: Callable[[Any, Array], Array]
    slope: Callable[[Any, Array], Array]
    cuda_value: str
    cuda_slope: str
    linear_where: Callable[[Array, Array], Array] | None = None
    cuda_linear_where: str = "false"
    curvature: float = 1.0
    exact: bool = False
    pieces: tuple[Piece, ...] = ()

    @property
    def is_identity(self) -> bool:
        return self.name == "identity"

    @property
    def range(self) -> tuple[float, float]:
        """Least and largest value of a piecewise linear activation; else all numbers."""
        ends = [
            piece.slope * end + piece.offset if piece.slope else piece.offset
            for piece in self.pieces
            for end in (piece.low, piece.high)
        ]
        return min(ends, default=-math.inf), max(ends, default=math.inf)

    @property
    def has_convex_surrogate(self) -> bool:
        return self.linear_where is not None


def _text(number: float) -> str:
    """A number as `get` reads it back, without a needless ``.0``."""
    return repr(int(number)) if number == int(number) else repr(number)


def _identity() -> Activation:
    return Activation(
        "identity",
        value=lambda ops, z: z,
        slope=lambda ops, z: ops.xp.ones_like(z),
        cuda_value="z",
        cuda_slope="T(1)",
        linear_where=lambda z, y: z == z,
        cuda_linear_where="true",
        exact=True,
        pieces=(Piece(-math.inf, math.inf, 1.0, 0.0),),
    )


def _relu() -> Activation:
    return Activation(
        "relu",
        value=lambda ops, z: ops.xp.maximum(z, 0),
        slope=lambda ops, z: (z > 0).astype(z.dtype),
        cuda_value="(z > T(0) ? z : (z <= T(0) ? T(0) : z))",
        cuda_slope="(z > T(0) ? T(1) : T(0))",
        linear_where=lambda z, y: (z > 0) | (y > 0),
        cuda_linear_where="(z > T(0) || y > T(0))",
        exact=True,
        pieces=(Piece(-math.inf, 0.0, 0.0, 0.0), Piece(0.0, math.inf, 1.0, 0.0)),
    )


def _clamp(low: float, high: float) -> Activation:
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise InputError(
            complain(f"clamp({low},{high})", "finite limits, low < high", "Use relu for no upper.")
        )
    return Activation(
        f"clamp({_text(low)},{_text(high)})",
        value=lambda ops, z: ops.xp.clip(z, low, high),
        slope=lambda ops, z: ((z > low) & (z < high)).astype(z.dtype),
        cuda_value=f"(z < T({low!r}) ? T({low!r}) : (z > T({high!r}) ? T({high!r}) : z))",
        cuda_slope=f"(z > T({low!r}) && z < T({high!r}) ? T(1) : T(0))",
        linear_where=lambda z, y: ((z > low) | (y > low)) & ((z < high) | (y < high)),
        cuda_linear_where=(
            f"((z > T({low!r}) || y > T({low!r})) && (z < T({high!r}) || y < T({high!r})))"
        ),
        exact=True,
        pieces=(
            Piece(-math.inf, low, 0.0, low),
            Piece(low, high, 1.0, 0.0),
            Piece(high, math.inf, 0.0, high),
        ),
    )


def _leaky_relu(a: float) -> Activation:
    if not 0 <= a < 1:
        raise InputError(
            complain(f"leaky_relu({a:g})", "a negative slope in [0, 1)", "Use identity or relu.")
        )
    return Activation(
        f"leaky_relu({_text(a)})",
        value=lambda ops, z: ops.xp.where(z > 0, z, a * z),
        slope=lambda ops, z: ops.xp.where(z > 0, z.dtype.type(1), z.dtype.type(a)),
        cuda_value=f"(z > T(0) ? z : T({a!r}) * z)",
        cuda_slope=f"(z > T(0) ? T(1) : T({a!r}))",
        linear_where=lambda z, y: (z > 0) | (y > 0),
        cuda_linear_where="(z > T(0) || y > T(0))",
        pieces=(Piece(-math.inf, 0.0, a, 0.0), Piece(0.0, math.inf, 1.0, 0.0)),
    )


def _sigmoid_of(ops: Any, z: Array) -> Array:
    return ops.scipy.special.expit(z)


def _sigmoid() -> Activation:
    def slope(ops, z):
        s = _sigmoid_of(ops, z)
        return s * (1 - s)

    g = "(T(1) / (T(1) + exp(-z)))"
    return Activation("sigmoid", _sigmoid_of, slope, g, f"({g} * (T(1) - {g}))", curvature=0.2)


def _tanh() -> Activation:
    return Activation(
        "tanh",
        value=lambda ops, z: ops.xp.tanh(z),
        slope=lambda ops, z: 1 - ops.xp.tanh(z) ** 2,
        cuda_value="tanh(z)",
        cuda_slope="(T(1) - tanh(z) * tanh(z))",
        curvature=1.5,
    )


def _silu() -> Activation:
    def slope(ops, z):
        s = _sigmoid_of(ops, z)
        return s * (1 + z * (1 - s))

    g = "(T(1) / (T(1) + exp(-z)))"
    return Activation(
        "silu",
        lambda ops, z: z * _sigmoid_of(ops, z),
        slope,
        f"(z * {g})",
        f"({g} * (T(1) + z * (T(1) - {g})))",
        curvature=1.5,
    )


def _gelu() -> Activation:
    def cdf(ops, z):
        return 0.5 * (1 + ops.scipy.special.erf(z * z.dtype.type(1 / math.sqrt(2))))

    def density(ops, z):
        return ops.xp.exp(-0.5 * z * z) * z.dtype.type(1 / math.sqrt(2 * math.pi))

    c = f"(T(0.5) * (T(1) + erf(z * T({1 / math.sqrt(2)!r}))))"
    d = f"(exp(T(-0.5) * z * z) * T({1 / math.sqrt(2 * math.pi)!r}))"
    return Activation(
        "gelu",
        lambda ops, z: z * cdf(ops, z),
        lambda ops, z: cdf(ops, z) + z * density(ops, z),
        f"(z * {c})",
        f"({c} + z * {d})",
        curvature=1.7,
    )


def _gelu_tanh() -> Activation:
    a, b = math.sqrt(2 / math.pi), 0.044715

    def value(ops, z):
        return 0.5 * z * (1 + ops.xp.tanh(z.dtype.type(a) * (z + z.dtype.type(b) * z**3)))

    def slope(ops, z):
        t = ops.xp.tanh(z.dtype.type(a) * (z + z.dtype.type(b) * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * z.dtype.type(a) * (
            1 + z.dtype.type(3 * b) * z * z
        )

    t = f"tanh(T({a!r}) * (z + T({b!r}) * z * z * z))"
    return Activation(
        "gelu_tanh",
        value,
        slope,
        f"(T(0.5) * z * (T(1) + {t}))",
        f"(T(0.5) * (T(1) + {t}) + T(0.5) * z * (T(1) - {t} * {t}) * T({a!r})"
        f" * (T(1) + T({3 * b!r}) * z * z))",
        curvature=1.7,
    )


def _hardswish() -> Activation:
    def value(ops, z):
        # The outer where keeps -inf from giving -inf * 0.
        return ops.xp.where(z <= -3, z.dtype.type(0), z * ops.xp.clip(z + 3, 0, 6) / 6)

    def slope(ops, z):
        xp = ops.xp
        return xp.where(
            z <= -3, z.dtype.type(0), xp.where(z >= 3, z.dtype.type(1), (2 * z + 3) / 6)
        )

    return Activation(
        "hardswish",
        value,
        slope,
        "(z <= T(-3) ? T(0) : (z >= T(3) ? z : z * (z + T(3)) / T(6)))",
        "(z <= T(-3) ? T(0) : (z >= T(3) ? T(1) : (T(2) * z + T(3)) / T(6)))",
        curvature=2.3,
    )


_FACTORIES: dict[str, tuple[Callable[..., Activation], tuple[float, ...]]] = {
    "identity": (_identity, ()),
    "relu": (_relu, ()),
    "relu6": (lambda: _clamp(0.0, 6.0), ()),
    "clamp": (_clamp, (-1.0, 1.0)),
    "leaky_relu": (_leaky_relu, (0.01,)),
    "sigmoid": (_sigmoid, ()),
    "tanh": (_tanh, ()),
    "silu": (_silu, ()),
    "gelu": (_gelu, ()),
    "gelu_tanh": (_gelu_tanh, ()),
    "hardswish": (_hardswish, ()),
}


# How the activations are called in torch, by class and by function or method name. Each entry makes
# the name for `get` from the module, or from the call's arguments.
TORCH_MODULES: dict[str, Callable[[Any], str]] = {
    "ReLU": lambda module: "relu",
    "ReLU6": lambda module: "relu6",
    "LeakyReLU": lambda module: f"leaky_relu({module.negative_slope})",
    "Hardtanh": lambda module: f"clamp({module.min_val},{module.max_val})",
    "Sigmoid": lambda module: "sigmoid",
    "Tanh": lambda module: "tanh",
    "SiLU": lambda module: "silu",
    "GELU": lambda module: "gelu" if module.approximate == "none" else "gelu_tanh",
    "Hardswish": lambda module: "hardswish",
}
TORCH_FUNCTIONS: dict[str, Callable[..., str]] = {
    "relu": lambda z, inplace=False: "relu",
    "relu_": lambda z: "relu",
    "relu6": lambda z, inplace=False: "relu6",
    "leaky_relu": lambda z, negative_slope=0.01, inplace=False: f"leaky_relu({negative_slope})",
    "hardtanh": lambda z, min_val=-1.0, max_val=1.0, inplace=False: f"clamp({min_val},{max_val})",
    "sigmoid": lambda z: "sigmoid",
    "tanh": lambda z: "tanh",
    "silu": lambda z, inplace=False: "silu",
    "gelu": lambda z, approximate="none": "gelu" if approximate == "none" else "gelu_tanh",
    "hardswish": lambda z, inplace=False: "hardswish",
}


def names() -> list[str]:
    """The names that `get` accepts, without parameters."""
    return sorted(_FACTORIES)


def get(activation: str | Activation) -> Activation:
    """Look an activation up.

    Parameters
    ----------
    activation : str or Activation
        One of `names`, with parameters in brackets where it has any: ``"relu"``,
        ``"leaky_relu(0.1)"``, ``"clamp(0,6)"``. A record is returned unchanged.

    Raises
    ------
    InputError
        For a name that is not known or parameters that do not fit.
    """
    if isinstance(activation, Activation):
        return activation
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", str(activation))
    known = ", ".join(names())
    if match is None or match[1] not in _FACTORIES:
        raise InputError(
            complain(
                f"activation={activation!r}",
                f"one of {known}",
                "Pass the nearest of these, or 'identity' for a reconstruction before the"
                " activation.",
            )
        )
    factory, defaults = _FACTORIES[match[1]]
    if match[2] is None:
        return factory(*defaults)
    try:
        parameters = tuple(float(p) for p in match[2].split(",") if p.strip())
    except ValueError:
        parameters = ()
    if len(parameters) != len(defaults):
        raise InputError(
            complain(
                f"activation={activation!r}",
                f"{len(defaults)} number(s) in the brackets of {match[1]}",
                "Leave the brackets out for the defaults.",
            )
        )
    return factory(*parameters)
