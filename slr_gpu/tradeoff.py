"""How the error of a layer after its activation falls with what the layer may cost.

In: a `ResponseProblem`. Out: `TradeOff`, the held-out errors of closed forms over a grid of
(form, r, s, k), and the weight of each of them. With F = T L the whitened target (see
`slr_gpu.curves`) and H = X L^-T the whitened held-out rows, columns of S first, the response of
the best A on S plus the best U V of rank k is

    Z_k = z_mean + H_s F_sᵀ + (H_c F_cᵀ) U_k U_kᵀ,        U_k: leading eigenvectors of F_c F_cᵀ ,

so that one product and one eigendecomposition of size n answer for every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy

from .basis import rotated
from .decomposition import Structure
from .layer_budget import LayerBudget, round_down
from .problem import TINY, ResponseProblem, metric_of
from .support import SupportSearch, group_size

Array = Any

# Sizes of S and of the basis that are tried (half as many supports, each of which needs a
# factorisation of its own), and the ratio of neighbouring ranks.
GRID = 10
RANK_RATIO = 1.2
# Held-out rows are thinned to about so many: they compare structures, they do not fit.
JUDGES = 1024


@dataclass(frozen=True)
class Point:
    """A structure and its error ``||Y - r(Z)||^2 / ||Y||^2`` on held-out rows.

    On the fitted rows where none are held out.
    """

    structure: Structure
    error: float


class TradeOff:
    """Errors of one layer's closed forms.

    Parameters
    ----------
    problem : ResponseProblem
        In the layer's own coordinates.
    form : {"auto", "columns", "channels", "rotated", "spatial"}
        ``auto`` is ``rotated`` for kernels of several taps and ``columns`` for others.
    multiple : int
        See `LayerBudget`.
    """

    def __init__(self, problem: ResponseProblem, form: str = "auto", multiple: int = 1) -> None:
        if form == "auto":
            form = "rotated" if problem.taps > 1 else "columns"
        self.form = form
        n, channels, taps = problem.n, problem.channels, problem.taps
        dense = LayerBudget(n, channels, taps, ((1.0, n * channels * taps),), multiple)
        self._unit = dense.unit(self.form)
        problem = problem.regrouped() if form == "spatial" else problem
        # More outputs than columns: all is done in the span of the right-hand sides.
        self._frame: Array | None = None
        if n > problem.width and not problem.by_rows:
            self._frame = problem.ops.xp.linalg.qr(problem.start_rhs)[0]
            problem = problem.in_outputs(self._frame)
        self.problem = problem

    @cached_property
    def _ordered(self) -> ResponseProblem:
        """The problem in the basis that orders the channels."""
        return rotated(self.problem, self.problem.groups)

    @cached_property
    def _search(self) -> SupportSearch:
        return SupportSearch(self.problem, group_size(self.form, self.problem.taps))

    @cached_property
    def _supports(self) -> dict[int, Array]:
        """Kept groups at each size, from one elimination beside a part of middling rank."""
        search = self._search
        k = min(self.problem.n, self.problem.width) // 4
        return search.shrink(self._sizes(search.groups, GRID // 2), k)

    def _sizes(self, most: int, grid: int = GRID) -> list[int]:
        """0 and a grid up to `most`, denser for small sizes."""
        sizes = {1, *(round(most * ((i + 1) / grid) ** 2) for i in range(grid))} - {0}
        if most <= grid:
            sizes = set(range(1, most + 1))
        return [0, *sorted({round_down(size, self._unit) for size in sizes})]

    def _ranks(self, most: int) -> list[int]:
        """1, ..., `most`, geometric."""
        ranks, k = [], 1.0
        while k < most:
            ranks.append(round_down(round(k), self._unit))
            k = max(k + 1, k * RANK_RATIO)
        return sorted({*ranks, round_down(most, self._unit)})

    def points(self, affordable: Any = lambda structure: True) -> list[Point]:
        """Held-out errors over the grid.

        Parameters
        ----------
        affordable : callable
            Whether a structure is of interest; the others are left out.
        """
        found = self._rotated() if self.form in ("rotated", "spatial") else self._supported()
        points = []
        for structures, fixed, moving, gram in found:
            kept = [structure for structure in structures if affordable(structure)]
            if kept:
                points += self._judge(kept, fixed, moving, gram)
        return points

    def weight(self, structure: Structure) -> tuple[Array, Array]:
        """The closed form of a structure on the grid.

        Returns
        -------
        M, bias : float64 array, (n, m) and (n,)
            In the layer's own coordinates.
        """
        if structure.r is None:
            problem = self.problem
            columns = self._columns(self._supports[structure.s])
            metric, kept = metric_of(problem, columns)
        else:
            problem = self._ordered.truncated(structure.r)
            metric, kept = problem.metric, structure.s * problem.taps
        M = metric.project(metric.target(problem), kept, structure.k, vectors=False)[1]
        M = M if self._frame is None else self._frame @ M
        bias = problem.linear_bias(M)
        if problem.basis is not None:
            in_basis = M.reshape(len(M), structure.r, -1)
            M = problem.ops.xp.einsum("nrt,rc->nct", in_basis, problem.basis, optimize=True)
        return M.reshape(len(M), -1), bias

    # -- the two families ------------------------------------------------------------------------

    def _rotated(self) -> Iterator[tuple[list[Structure], Array, Array, Array]]:
        """For every (r, s): structures, ``H_s F_sᵀ``, ``H_c F_cᵀ`` and ``F_c F_cᵀ``."""
        problem = self._ordered
        rows = self._judges(problem)
        sizes = self._sizes(problem.groups)
        taps = problem.taps
        xp = problem.ops.xp
        # Sums up to each size, so that every pair (s, r) is one difference.
        X = rows.X
        responses = [xp.zeros((len(X), problem.n), rows.dtype)]
        grams = [xp.zeros((problem.n, problem.n))]
        widths = [size * taps for size in sizes[1:]]
        for added, gram in problem.metric.increments(problem, X, widths):
            responses.append(responses[-1] + added)
            grams.append(grams[-1] + gram)
        for j, r in enumerate(sizes):
            for i, s in enumerate(sizes[: j + 1]):
                # Beside another part, A takes whole blocks of channels.
                if r == 0 or (0 < s < r and s % self._unit):
                    continue
                # Rows of the basis that nobody reads cost something and give nothing.
                ranks = self._ranks(min(problem.n, (r - s) * taps)) if r > s else [0]
                structures = [Structure(self.form, s, k, r) for k in ranks]
                yield structures, responses[i], responses[j] - responses[i], grams[j] - grams[i]

    def _supported(self) -> Iterator[tuple[list[Structure], Array, Array, Array]]:
        """The same for every support."""
        problem = self.problem
        for s, groups in sorted(self._supports.items()):
            columns = self._columns(groups)
            metric, kept = metric_of(problem, columns)
            most = min(problem.n, problem.width - kept)
            ranks = ([0] if s else []) + (self._ranks(most) if most else [])
            X = self._judges(problem).X
            (fixed, _), (moving, gram) = metric.increments(problem, X, [kept, problem.width])
            yield [Structure(self.form, s, k) for k in ranks], fixed, moving, gram

    def _columns(self, groups: Array) -> Array:
        xp, size = self.problem.ops.xp, self._search.size
        return (groups[:, None] * size + xp.arange(size)[None]).reshape(-1)

    @staticmethod
    def _judges(problem: ResponseProblem) -> Any:
        rows = problem.held if problem.held.rows else problem.samples
        return rows.thinned(max(1, rows.rows // JUDGES))

    def _judge(
        self, structures: list[Structure], fixed: Array, moving: Array, gram: Array
    ) -> list[Point]:
        """Errors of structures that differ in their rank alone, ascending."""
        problem = self.problem
        ops, xp = problem.ops, problem.ops.xp
        rows = self._judges(problem)
        if problem.held.rows:
            activation, Y = problem.layer_io.activation, rows.Y
        else:
            activation, Y = problem.activation, rows.Y
        # Beyond the energy that rounding leaves, eigenvectors mean nothing; they do no harm.
        most = max(structure.k for structure in structures)
        U = xp.linalg.eigh(gram)[1][:, ::-1][:, :most].astype(Y.dtype) if most else None
        along = moving @ U if most else None
        if self._frame is not None:
            frame = self._frame.astype(Y.dtype)
            fixed, U = fixed @ frame.T, frame @ U if most else None
        Z = fixed + problem.z_mean.astype(Y.dtype)
        losses, done = [xp.sum(Y * Y, dtype="float64")], 0
        for structure in structures:
            if structure.k > done:
                Z = Z + along[:, done : structure.k] @ U[:, done : structure.k].T
                done = structure.k
            miss = activation.value(ops, Z) - Y
            losses.append(xp.sum(miss * miss, dtype="float64"))
        (losses,) = rows.group.sum((xp.stack(losses),), xp)
        energy, *losses = ops.to_numpy(losses)
        errors = numpy.array(losses) / max(energy, TINY)
        return [Point(s, float(e)) for s, e in zip(structures, errors, strict=True)]
