"""The rotated form with given sizes, written plainly in PyTorch: the baseline of speed figures.

In: the arrays around one layer and (r, s, k). Out: what
``slr_gpu.fit(layer_io, basis_rows=r, channels=s, rank=k, held_out=0, ridge=ridge,
solver=Majorize(iterations=..., tolerance=0))`` finds, by the same steps: centred inputs, a basis of
the channels from the weight and then from the regression in the channel Gram, its refinement in
alternation with the factors, one Cholesky factor L of G = Xcᵀ Xc + rho I, and rounds of

    T = M + (1/c) (Rᵀ Xc + rho (W - M)) G⁻¹ ,   R = 1[Z > 0 or Y > 0] (Y - Z)

projected onto {A on the first s channels} + {rank k} in the metric of G, on l_c for ReLU. This is
how one would write it without kernels of one's own: whole arrays, library calls, any torch
device. `plain_compress` does a whole network so. Nothing of slr_gpu is imported, so it also checks the package's answer.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows whose products are added up in float64 together.
GRAM_ROWS = 16_384
# A majoriser is flattened by this after a step that lowered the objective, as in the package.
FLATTER = 0.7


def products(left: Tensor, right: Tensor) -> Tensor:
    """``leftᵀ right``: products of blocks of rows in their own precision, summed in float64."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for a, b in zip(left.split(GRAM_ROWS), right.split(GRAM_ROWS), strict=True):
        total += a.T @ b
    return total


def with_ridge(gram: Tensor, rho: Tensor) -> Tensor:
    """``gram + rho I``."""
    return gram + rho * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def channels_last(array: Tensor, taps: int) -> Tensor:
    """Rows of channels * taps columns as (rows * taps, channels)."""
    return array.reshape(len(array), -1, taps).transpose(1, 2).flatten(0, 1)


def turned(array: Tensor, basis: Tensor, taps: int) -> Tensor:
    """``array Eᵀ`` with E = basis ⊗ I_taps."""
    by_channel = array.reshape(len(array), -1, taps)
    return torch.einsum("pct,rc->prt", by_channel, basis.to(array.dtype)).flatten(1)


def mean_over_taps(scatter: Tensor, taps: int) -> Tensor:
    """Mean of the diagonal channel blocks (c, c) of a scatter matrix (c * taps, c * taps)."""
    channels = len(scatter) // taps
    blocks = scatter.reshape(channels, taps, channels, taps)
    return torch.einsum("itjt->ij", blocks) / taps


def rotation(weight: Tensor, channel_gram: Tensor, taps: int) -> Tensor:
    """Orthonormal rows (c, c) by what a weight responds to in the metric of a channel Gram."""
    R = torch.linalg.cholesky(channel_gram)
    weighted = channels_last(weight, taps) @ R
    right = torch.linalg.eigh(weighted.T @ weighted).eigenvectors.flip(1)
    return torch.linalg.qr(torch.linalg.solve_triangular(R.T, right, upper=True)).Q.T


def whiten(L: Tensor, rhs: Tensor) -> Tensor:
    """``rhs L^-T``."""
    return torch.linalg.solve_triangular(L, rhs.T, upper=False).T


def low_rank(F: Tensor, k: int) -> Tensor:
    """Best approximation of rank k, from the smaller Gram matrix."""
    wide = F.shape[0] <= F.shape[1]
    vectors = torch.linalg.eigh(F @ F.T if wide else F.T @ F).eigenvectors
    leading = vectors[:, len(vectors) - k :]
    return leading @ (leading.T @ F) if wide else (F @ leading) @ leading.T


def best_basis(
    M: Tensor, basis: Tensor, rhs: Tensor, gram: Tensor, channel_gram: Tensor, steps: int = 5
) -> Tensor:
    """The basis P (r, c) that suits factors M (n, r, taps) best, rows orthonormal, near `basis`.

    ``M (P ⊗ I) gram = rhs`` in least squares, by conjugate gradients preconditioned by the
    Kronecker product of ``M Mᵀ`` and the channel Gram.
    """
    n, r, taps = M.shape

    def expand(P: Tensor) -> Tensor:
        return torch.einsum("nrt,rc->nct", M, P).flatten(1)

    def contract(N: Tensor) -> Tensor:
        return torch.einsum("nrt,nct->rc", M, N.reshape(n, -1, taps))

    def precondition(residual: Tensor) -> Tensor:
        return torch.linalg.solve(channel_gram, torch.linalg.solve(factors, residual).T).T

    factors = torch.einsum("nrt,nst->rs", M, M)
    factors = with_ridge(factors, 1e-6 * factors.trace() / r + 1e-30)
    residual = contract(rhs - expand(basis) @ gram)
    direction = scaled = precondition(residual)
    power = (residual * scaled).sum()
    for _ in range(steps):
        if not power > 0:
            break
        moved = contract(expand(direction) @ gram)
        step = power / (direction * moved).sum()
        basis, residual = basis + step * direction, residual - step * moved
        scaled = precondition(residual)
        previous, power = power, (residual * scaled).sum()
        direction = scaled + power / previous * direction
    return torch.linalg.qr(basis.T).Q.T


@torch.no_grad()
def plain_majorize(
    weight: Tensor,
    bias: Tensor,
    inputs: Tensor,
    targets: Tensor,
    linear_targets: Tensor | None,
    kernel_taps: int,
    r: int,
    s: int,
    k: int,
    iterations: int,
    ridge: float,
) -> tuple[Tensor, Tensor, list[float]]:
    """Fit one ReLU layer in the rotated form.

    Parameters
    ----------
    weight, bias : tensor, (n, m), (n,)
        m = c * kernel_taps, an input channel's taps side by side.
    inputs : tensor, (P, m)
        Its dtype (float32 or float64) is that of the work over samples, and its device that of
        all the work; the other tensors are on the same device.
    targets : tensor, (P, n)
        Responses wanted after the ReLU, >= 0, in the dtype of the inputs.
    linear_targets : tensor, (P, n), or None
        Responses wanted before it; None for the layer's own.
    kernel_taps : int
    r, s, k : int
        Rows of the basis, rotated channels in A, rank of the rest; s <= r, and
        k <= min(n, (r - s) * kernel_taps).
    iterations : int
        Exactly so many.
    ridge : float
        rho as a fraction of the mean variance of the inputs.

    Returns
    -------
    weight : tensor, (n, m)
        ``(A + U V) E``, dense, in the dtype of the inputs.
    bias : tensor, (n,)
    history : list of float
        ``(1/P) sum l_c + (rho/P) ||M - W||²`` after each iteration.
    """
    rows, dtype, taps, kept = len(inputs), inputs.dtype, kernel_taps, s * kernel_taps
    if linear_targets is None:
        linear_targets = torch.addmm(bias.to(dtype), inputs, weight.to(dtype).T)
    W = weight.double()
    x_mean = inputs.mean(0, dtype=torch.float64)
    z_mean = linear_targets.mean(0, dtype=torch.float64)
    X = inputs - x_mean.to(dtype)
    # The package estimates the mean variance on about 2048 rows; so it is here, for the same rho.
    rho = ridge * rows * X[:: max(1, rows // 2048)].square().mean(dtype=torch.float64)

    # The weight chooses 2 r rows of a basis; the regression within them puts them in order.
    flat = channels_last(X, taps)
    basis = rotation(W, with_ridge(products(flat, flat) / taps, rho), taps)[: 2 * r]
    wide, W, x_mean = (turned(array, basis, taps) for array in (X, W, x_mean[None]))
    scatter, correlation = products(wide, wide), products(linear_targets, wide)
    factor = torch.linalg.cholesky(with_ridge(scatter, rho))
    target = torch.cholesky_solve((correlation + rho * W).T, factor).T
    order = rotation(target, with_ridge(mean_over_taps(scatter, taps), rho), taps)
    W, x_mean, correlation = (turned(array, order, taps) for array in (W, x_mean, correlation))
    scatter = turned(turned(scatter, order, taps).T, order, taps)

    rhs, gram = correlation + rho * W, with_ridge(scatter, rho)
    channel_gram = with_ridge(mean_over_taps(scatter, taps), rho)

    def project(L: Tensor, F: Tensor) -> tuple[Tensor, Tensor]:
        F = torch.cat([F[:, :kept], low_rank(F[:, kept:], k)], dim=1)
        return F, torch.linalg.solve_triangular(L.T, F.T, upper=True).T

    def closed_form(P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        L = torch.linalg.cholesky(turned(turned(gram, P, taps).T, P, taps))
        return L, *project(L, whiten(L, turned(rhs, P, taps)))

    # The first r of them, then twice the rows that suit the factors best, while that helps.
    rows_of_order = torch.eye(r, len(order), dtype=torch.float64, device=W.device)
    L, F, M = closed_form(rows_of_order)
    for _ in range(2 if r < len(order) else 0):
        factors = M.reshape(len(M), r, taps)
        trial = best_basis(factors, rows_of_order, rhs, gram, channel_gram)
        trial_L, trial_F, trial_M = closed_form(trial)
        if trial_F.square().sum() <= F.square().sum():
            break
        rows_of_order, L, F, M = trial, trial_L, trial_F, trial_M
    basis, order = rows_of_order @ order @ basis, rows_of_order @ order
    W, x_mean = turned(W, rows_of_order, taps), turned(x_mean, rows_of_order, taps)[0]
    X = turned(wide, order, taps)

    def sweep(M: Tensor, b: Tensor) -> tuple[float, Tensor, Tensor]:
        Z = torch.addmm((b + M @ x_mean).to(dtype), X, M.to(dtype).T)
        R = torch.where((Z > 0) | (targets > 0), targets - Z, 0)
        loss = R.square().sum(dtype=torch.float64) + rho * (M - W).square().sum()
        return loss.item() / rows, (R.T @ X).double(), R.mean(0, dtype=torch.float64)

    b = z_mean - M @ x_mean
    objective, RtX, R_mean = sweep(M, b)
    curvature, flattest, history = 1.0, 0.0, []
    momentum, age = None, 0
    for _ in range(iterations):
        step = whiten(L, RtX + rho * (W - M))
        centred = b + M @ x_mean
        while True:
            goal, new_centred = F + step / curvature, centred + R_mean / curvature
            if momentum is not None:
                share = age / (age + 3)
                goal, new_centred = goal + share * momentum[0], new_centred + share * momentum[1]
            new_F, new_M = project(L, goal)
            new_b = new_centred - new_M @ x_mean
            new = sweep(new_M, new_b)
            # Without momentum the majoriser of curvature 1 is proven: no rise but by rounding.
            if new[0] <= objective or (momentum is None and curvature == 1.0):
                break
            if momentum is not None:
                momentum, age = None, 0
            else:
                flattest = min(curvature / FLATTER**2, 1.0)
                curvature = 1.0
        momentum, age = (new_F - F, new_centred - centred), age + 1
        F, M, b, (objective, RtX, R_mean) = new_F, new_M, new_b, new
        curvature = max(curvature * FLATTER, flattest)
        history.append(objective)
    dense = torch.einsum("nrt,rc->nct", M.reshape(len(M), r, taps), basis).flatten(1)
    return dense.to(dtype), b.to(dtype), history


@torch.no_grad()
def plain_compress(
    chain: list[nn.Module],
    inputs: Tensor,
    sizes: dict[int, tuple[int, int, int]],
    *,
    rows: int,
    batch: int,
    iterations: int,
    ridge: float,
) -> list[nn.Module]:
    """Fit the convolutions of a network that is a chain of modules, each followed by a ReLU.

    Parameters
    ----------
    chain : list of modules
        In the order in which they run, BatchNorms folded, in evaluation mode; not changed.
    inputs : tensor, (N, ...)
        Calibration inputs, on the device of the modules.
    sizes : dict
        (r, s, k) by the position in the chain of the convolution.
    rows : int
        About so many output positions a layer are sampled.
    batch : int
    iterations, ridge
        See `plain_majorize`.

    Returns
    -------
    list of modules
        The convolutions with the weights that were found, dense; the rest shared with `chain`.
    """
    generator = torch.Generator().manual_seed(0)
    originals = list(inputs.split(batch))
    compressed, result = list(originals), []
    for position, module in enumerate(chain):
        new = module
        if position in sizes:
            X, Z = [], []
            for x, y in zip(compressed, originals, strict=True):
                patches = F.unfold(x, module.kernel_size, padding=module.padding)
                responses = module(y).flatten(2)
                each = max(1, min(patches.shape[2], round(rows / len(inputs))))
                keys = torch.rand(len(x), patches.shape[2], generator=generator)
                chosen = keys.topk(each, dim=1).indices.to(x.device)
                sample = torch.arange(len(x), device=x.device)[:, None]
                X.append(patches.transpose(1, 2)[sample, chosen].flatten(0, 1))
                Z.append(responses.transpose(1, 2)[sample, chosen].flatten(0, 1))
            X, Z = torch.cat(X), torch.cat(Z)
            weight, bias, _ = plain_majorize(
                module.weight.flatten(1), module.bias, X, Z.relu(), Z,
                module.kernel_size[0] * module.kernel_size[1],
                *sizes[position], iterations, ridge,
            )  # fmt: skip
            new = copy.deepcopy(module)
            new.weight.copy_(weight.reshape(module.weight.shape))
            new.bias.copy_(bias)
        result.append(new)
        # Not in place: a ReLU would write over what the other network still needs.
        originals = [module(y.clone()) for y in originals]
        compressed = [new(x.clone()) for x in compressed]
    return result
