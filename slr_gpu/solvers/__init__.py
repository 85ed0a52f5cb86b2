"""The solvers, by the names that reports and the command line use."""

from .admm import ADMM
from .base import Solver
from .baselines import ChannelPruning, Magnitude, WeightSVD, WhitenedSVD
from .grebsmo import Grebsmo
from .majorize import Majorize
from .zhang import Zhang

SOLVERS: dict[str, type[Solver]] = {
    solver.name: solver
    for solver in (
        Majorize,
        ADMM,
        Zhang,
        Grebsmo,
        Magnitude,
        WeightSVD,
        WhitenedSVD,
        ChannelPruning,
    )
}
