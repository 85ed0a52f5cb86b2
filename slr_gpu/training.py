"""Training of some parameters: the optimiser, the best values seen, and both on disk.

Matrices and kernels take steps along the polar factor of their averaged gradient, in which all
directions count alike ("Muon", Jordan et al. 2024). Adam's steps follow the few directions of
largest gradient: a VGG-16 at a twentieth of its FLOPs was after 60 epochs of these steps at 0.82 of
the loss after 100 of Adam's, and sooner. Vectors are left to Adam (Kingma and Ba 2015). Every
tensor's step is a fraction of its root mean square, so that factors of different scale move alike;
the rate rises briefly and falls as half a cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .batches import Batch, run_model
from .checkpoint import Store
from .parallel import ALONE, Group

# Of the quintic Newton-Schulz iteration (Jordan et al. 2024): five rounds bring all singular values
# above a hundredth of the norm to between 0.7 and 1.2, which serves as well as 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def polar(matrix: Tensor) -> Tensor:
    """Nearly U V^T of the singular value decomposition U S V^T of a matrix.

    torch's own Muon does this in bfloat16, which takes five times as long on CPUs without it.

    Parameters
    ----------
    matrix : Tensor (n, m)

    Returns
    -------
    Tensor (n, m)
        0 for 0.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.mT
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Steps of root mean square 1 along the polar factor of the averaged gradient.

    Parameters
    ----------
    params : iterable of parameters or groups
        Of two axes or more; kernels are taken as matrices, a row an output.
    lr : float
    momentum : float
        Of the average, which looks one step ahead (Nesterov).
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:
        """One step on the gradients that there are."""
        for group in self.param_groups:
            momentum = group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"] = torch.zeros_like(p)
                average = state["average"].lerp_(p.grad, 1 - momentum)
                matrix = p.grad.lerp(average, momentum).flatten(1)
                update = polar(matrix).reshape(p.shape)
                # The polar factor of a full n x m matrix has min(n, m) singular values of 1.
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(matrix.shape)))


class Trainer:
    """Parameters being trained, the best values seen, and both on disk.

    Parameters
    ----------
    parameters : list of nn.Parameter
    rate : float
        Largest step of a tensor, as a fraction of its root mean square as it is now.
    group : Group
        Ranks whose gradients are averaged.
    """

    def __init__(self, parameters: list[nn.Parameter], rate: float, group: Group = ALONE) -> None:
        self.parameters, self.group = parameters, group
        self.best, self.best_values = math.inf, self._values()
        kinds: dict[type[torch.optim.Optimizer], list[dict]] = {Muon: [], torch.optim.Adam: []}
        for p in parameters:
            scale = rate * float(p.detach().square().mean().sqrt())
            kind = Muon if p.ndim > 1 else torch.optim.Adam
            kinds[kind].append({"params": [p], "lr": scale, "scale": scale})
        self.optimizers = [kind(groups) for kind, groups in kinds.items() if groups]

    def _values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.parameters]

    def _states(self) -> list[dict[str, Tensor]]:
        """What the optimisers know of each parameter."""
        known = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        return [known.get(p, {}) for p in self.parameters]

    def step(self, loss: Tensor, share: float, samples: int = 1) -> None:
        """One step on the mean loss of the samples of all ranks; `share` of all steps are done."""
        for p in self.parameters:
            p.grad = None
        if loss.requires_grad:  # control flow may leave all layers out
            loss.backward()
        if self.group.size > 1:
            self._average_gradients(samples)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["scale"] * schedule(share)
            optimizer.step()

    def _average_gradients(self, samples: int) -> None:
        for p in self.parameters:
            if p.grad is None:  # control flow may leave a layer out
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.reshape(-1) for p in self.parameters]).double().cpu().numpy()
        total, count = self.group.sum((samples * flat, np.float64(samples)))
        parts = torch.from_numpy(total / count).split([p.numel() for p in self.parameters])
        for p, part in zip(self.parameters, parts, strict=True):
            p.grad.copy_(part.reshape(p.shape))

    def note(self, error: float) -> None:
        """Remember the values if this error is the least so far; NaN is not."""
        if error < self.best:
            self.best, self.best_values = error, self._values()

    def restore_best(self) -> None:
        with torch.no_grad():
            for p, value in zip(self.parameters, self.best_values, strict=True):
                p.copy_(value)

    def save(self, store: Store, epochs: int) -> None:
        """Write all that the epochs to come depend on."""
        arrays = {}
        for number, (p, best, state) in enumerate(
            zip(self.parameters, self.best_values, self._states(), strict=True)
        ):
            tensors = {"value": p.detach(), "best": best}
            tensors |= {f"state.{name}": tensor for name, tensor in state.items()}
            arrays |= {f"{number}.{name}": t.cpu().numpy() for name, t in tensors.items()}
        store.save_arrays("state", arrays, {"epochs": str(epochs), "best": repr(self.best)})

    def load(self, store: Store) -> int:
        """Read what `save` wrote; the number of epochs done, 0 where there is nothing."""
        found = store.load_arrays("state")
        if found is None:
            return 0
        arrays, facts = found
        states = {
            p: optimizer.state[p]
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
        }
        for name, array in arrays.items():
            number, _, piece = name.partition(".")
            p, tensor = self.parameters[int(number)], torch.from_numpy(array)
            if piece == "value":
                with torch.no_grad():
                    p.copy_(tensor)
            elif piece == "best":
                self.best_values[int(number)] = tensor.to(p)
            else:
                # In the layout of the values, as it was made: then bits do not depend on it.
                if tensor.shape == p.shape:
                    tensor = torch.empty_like(p.detach()).copy_(tensor)
                states[p][piece.removeprefix("state.")] = tensor
        self.best = float(facts["best"])
        return int(facts["epochs"])


def schedule(share: float) -> float:
    """Rate at a share of all steps, of its largest: a short rise, then half a cosine."""
    return min(1.0, share / 0.05 + 0.05) * 0.5 * (1 + math.cos(math.pi * share))


@contextmanager
def only_these_train(model: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients for some parameters alone; afterwards all is as it was."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        for p, wanted in before:
            p.grad = None
            p.requires_grad_(wanted)


@contextmanager
def channels_last(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Weights of 2-D convolutions with their channels last, in which CPUs train 1.7 times as fast.

    What convolutions return is laid out so too. A model whose code relies on the other layout (by
    ``view``, say) keeps it.
    """
    kernels = [p for p in model.parameters() if p.ndim == 4 and p.is_contiguous() and not p.is_cuda]

    def lay(memory_format: torch.memory_format) -> None:
        for p in kernels:
            p.data = p.data.contiguous(memory_format=memory_format)

    lay(torch.channels_last)
    try:
        try:
            with torch.no_grad():
                run_model(model, batch)
        except RuntimeError:
            lay(torch.contiguous_format)
        yield
    finally:
        lay(torch.contiguous_format)
