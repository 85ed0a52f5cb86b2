"""Column-sparse plus low-rank compression of trained networks. See README.md."""

from .compress import Result, compress, load
from .curves import LayerBudget
from .decomposition import Decomposition, Status, Structure
from .errors import BackendError, BudgetError, InputError, ModelError, SLRError
from .fit import fit
from .layer_io import LayerIO
from .solvers.admm import ADMM
from .solvers.majorize import Majorize

__all__ = [
    "ADMM",
    "BackendError",
    "BudgetError",
    "Decomposition",
    "InputError",
    "LayerBudget",
    "LayerIO",
    "Majorize",
    "ModelError",
    "Result",
    "SLRError",
    "Status",
    "Structure",
    "compress",
    "fit",
    "load",
]
