"""Column-sparse plus low-rank compression of trained networks. See README.md."""

from .compress import compress
from .decomposition import Decomposition, Status, Structure
from .errors import BackendError, BudgetError, InputError, ModelError, SLRError
from .fit import fit
from .layer_budget import LayerBudget
from .layer_io import LayerIO
from .result import Result, load
from .runtime import BenchResult, bench
from .solvers import (
    ADMM,
    ChannelPruning,
    Grebsmo,
    Magnitude,
    Majorize,
    WeightSVD,
    WhitenedSVD,
    Zhang,
)

__all__ = [
    "ADMM",
    "BackendError",
    "BenchResult",
    "BudgetError",
    "ChannelPruning",
    "Decomposition",
    "Grebsmo",
    "InputError",
    "LayerBudget",
    "LayerIO",
    "Magnitude",
    "Majorize",
    "ModelError",
    "Result",
    "SLRError",
    "Status",
    "Structure",
    "WeightSVD",
    "WhitenedSVD",
    "Zhang",
    "bench",
    "compress",
    "fit",
    "load",
]
