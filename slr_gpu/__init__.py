"""Column-sparse plus low-rank compression of trained networks. See README.md."""

from .analysis import Analysis
from .compress import apply, compress
from .decomposition import Decomposition, Status, Structure
from .errors import BackendError, BudgetError, InputError, ModelError, SLRError
from .fit import fit
from .layer_budget import LayerBudget
from .layer_io import LayerIO
from .layer_seconds import LatencyTarget
from .parallel import Group, ranks
from .plan import Plan
from .refine import Refinement
from .result import Result, load
from .runtime import BenchResult, bench
from .sensitivity import analyze
from .shards import open_shards
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
    "Analysis",
    "BackendError",
    "BenchResult",
    "BudgetError",
    "ChannelPruning",
    "Decomposition",
    "Grebsmo",
    "Group",
    "InputError",
    "LatencyTarget",
    "LayerBudget",
    "LayerIO",
    "Magnitude",
    "Majorize",
    "ModelError",
    "Plan",
    "Refinement",
    "Result",
    "SLRError",
    "Status",
    "Structure",
    "WeightSVD",
    "WhitenedSVD",
    "Zhang",
    "analyze",
    "apply",
    "bench",
    "compress",
    "fit",
    "load",
    "open_shards",
    "ranks",
]
