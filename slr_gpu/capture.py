"""From a model and calibration batches to the `LayerIO` of one layer after another.

In: the original model (BatchNorms folded), batches, and the inputs of a layer in the partly
compressed copy (*asymmetric*: the layers already compressed are in front of them), which a
`Frontier` brings. Out: sampled rows. Targets come from one pass through the original. A layer that
is called several times is fitted on the rows of all its uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from . import activations
from .adapters import adapter_for
from .batches import Batches, first_tensor, run_model, tidy
from .errors import ModelError, complain
from .frontier import first_input
from .graph import LayerSite, hooks
from .grouped import split
from .layer_io import LayerIO
from .ops import NumpyOps
from .parallel import ALONE, Group


class Use(NamedTuple):
    """One call of a layer while a batch went through the original.

    `leading` is the length of the leading dimension of its output, mostly that of the batch, and
    `positions` how many outputs an entry along it has.
    """

    batch: int
    leading: int
    positions: int
    input_shape: tuple[int, ...]


class Sampler:
    """Which output positions of which samples are used, the same for every pass.

    Parameters
    ----------
    rows : int
        About so many rows a layer in total, of some of the samples only where there are more.
    batch_sizes : list of int
        Calibration samples in each batch, of all ranks.
    seed : int
    group : Group
        The ranks that the batches are shared among.
    """

    def __init__(self, rows: int, batch_sizes: list[int], seed: int, group: Group = ALONE) -> None:
        self.rows, self.batch_sizes, self.seed, self.group = rows, batch_sizes, seed, group
        self._starts = np.cumsum([0, *batch_sizes])
        self.sample_count = int(self._starts[-1])

    def pick(self, site: LayerSite, use: Use, call: int) -> tuple[Tensor, Tensor, np.ndarray]:
        """Rows of one use, without repetition.

        Where the leading dimension is no multiple of the batch (regions of images, say), samples
        are taken to own neighbouring parts of it, as equal as can be.

        Parameters
        ----------
        call : int
            How many uses by this batch went before.

        Returns
        -------
        index, position : tensor, (rows,)
            Along the leading dimension, and among the positions of each of its entries.
        sample : int array, (rows,)
            Numbers of the calibration samples, ascending.
        """
        batch_size = self.batch_sizes[use.batch]
        chunks = batch_size if use.leading % batch_size == 0 else 1
        positions = use.leading * use.positions // chunks  # of a chunk
        share = self.rows * batch_size / (self.sample_count * chunks * max(site.calls, 1))
        count = min(positions, max(1, round(share)))
        entropy = [self.seed, site.order, use.batch, *([call] if call else [])]
        seed = np.random.SeedSequence(entropy).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(seed))
        taken = torch.arange(chunks)
        if self.sample_count > self.rows:  # fewer rows than samples: of some of them only
            parts = self.sample_count * max(site.calls, 1)
            begin, end = self._starts[use.batch : use.batch + 2] * self.rows // parts
            if end - begin < chunks:
                order = torch.randperm(chunks, generator=generator)
                taken = order[: int(end - begin)].sort().values
        if count == positions:
            position = torch.arange(positions).repeat(len(taken))
        else:
            keys = torch.rand(len(taken), positions, generator=generator)
            position = keys.topk(count, dim=1).indices.sort(dim=1).values.reshape(-1)
        flat = taken.repeat_interleave(count) * positions + position
        index = flat // max(use.positions, 1)
        sample = self._starts[use.batch] + index.numpy() * batch_size // max(use.leading, 1)
        return index, flat % max(use.positions, 1), sample


@dataclass
class References:
    """What one pass through the original leaves for each layer.

    Attributes
    ----------
    linear_targets, inputs : dict of str to array
        Sampled rows; inputs only where asked for. NumPy arrays, or torch tensors on the device.
    resident : bool
        Whether rows stay on the device of the model.
    uses : dict of str to list of Use
        Every call, in the order of execution.
    """

    linear_targets: dict[str, Any]
    inputs: dict[str, Any]
    uses: dict[str, list[Use]]
    resident: bool = False

    def release(self, name: str) -> None:
        """Forget a layer's rows."""
        self.linear_targets.pop(name)
        self.inputs.pop(name, None)

    def calls(self, name: str) -> Counter[int]:
        """How often each batch used a layer."""
        return Counter(use.batch for use in self.uses[name])


def _joined(rows: list[Tensor], resident: bool) -> Any:
    """All rows (P, width) in float32: a tensor where they are, or a host array."""
    rows = [part.detach().float() for part in rows]
    return torch.cat(rows) if resident else torch.cat([part.cpu() for part in rows]).numpy()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products and convolutions of float32 without TF32, whose ten bits would be fitted to."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with cudnn.flags(cudnn.enabled, cudnn.benchmark, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def record_references(
    model: nn.Module,
    batches: Batches,
    sites: list[LayerSite],
    sampler: Sampler,
    *,
    with_inputs: bool = False,
    ops: NumpyOps | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> References:
    """Responses before the activation (and inputs) of all layers, sampled, in one pass.

    Parameters
    ----------
    model : nn.Module
        The original, BatchNorms folded.
    with_inputs : bool
        Also keep the layers' inputs in the original, for symmetric fits.
    ops : NumpyOps, optional
        Where the fits will run: rows stay there where it is a device that has room for all.
    advance : callable
        Told how many samples have gone through, for a progress bar.
    """
    taken: list[dict[str, list[Tensor]]] = [{site.name: [] for site in sites} for _ in range(2)]
    outputs, inputs = taken
    uses: dict[str, list[Use]] = {site.name: [] for site in sites}
    number, calls = 0, Counter()  # of this batch
    resident = _stays(model, sites, sampler, with_inputs, ops)

    def kept(rows: Tensor) -> Tensor:
        # Taken now: an in-place activation may write over the response.
        return rows.clone() if resident else rows.cpu().clone()

    def collect(site: LayerSite, layer: nn.Module) -> Callable:
        adapter = adapter_for(layer)

        def hook(module, args, kwargs, output):
            x = adapter.batched(layer, first_input(args, kwargs), site.batch_axis)
            y = adapter.batched(layer, output, site.batch_axis)
            use = Use(number, len(y), adapter.positions(layer, y), tuple(x.shape))
            call = calls[site.name]
            calls[site.name] += 1
            uses[site.name].append(use)
            *where, _ = sampler.pick(site, use, call)
            outputs[site.name].append(kept(adapter.output_rows(layer, y, *where)))
            if with_inputs:
                inputs[site.name].append(kept(adapter.input_rows(layer, x, *where)))

        return hook

    with hooks() as handles, torch.no_grad():
        for site in sites:
            layer = model.get_submodule(site.name)
            handles.append(layer.register_forward_hook(collect(site, layer), with_kwargs=True))
        for number, batch in batches.numbered():
            calls.clear()
            run_model(model, batch, number)
            tidy(number)
            advance(len(first_tensor(batch)))
    # One layer at a time: what was joined is forgotten in pieces.
    joined = ({s.name: _joined(d.pop(s.name), resident) for s in sites if d[s.name]} for d in taken)
    return References(*joined, uses, resident)


def _stays(
    model: nn.Module,
    sites: list[LayerSite],
    sampler: Sampler,
    with_inputs: bool,
    ops: NumpyOps | None,
) -> bool:
    """Whether the rows of all layers may stay on the device that they are made on."""
    if ops is None or next(model.parameters()).device.type == "cpu" or ops.device == "cpu":
        return False
    weights = [model.get_submodule(site.name).weight for site in sites]
    widths = [len(w) + (w[0].numel() if with_inputs else 0) for w in weights]
    # And the inputs of one layer beside them.
    widths.append(max(w[0].numel() for w in weights))
    return ops.memory.fits(4 * sampler.rows * sum(widths))


def layer_parts(
    layer: nn.Module,
    site: LayerSite,
    references: References,
    sampler: Sampler,
    inputs: Iterable[tuple[int, Tensor]] | None,
) -> list[LayerIO]:
    """The `LayerIO` of one layer, or of each group of a grouped one.

    Parameters
    ----------
    inputs : iterable of (batch number, tensor), or None
        From `Frontier.inputs`; None takes the original's inputs (symmetric).

    Raises
    ------
    ModelError
        When the layers compressed before make the model take another way, so that fewer than two
        rows of this layer can be compared.
    """
    adapter, uses = adapter_for(layer), references.uses[site.name]
    targets = references.linear_targets[site.name]
    picks, seen = [], Counter()
    for use in uses:
        picks.append(sampler.pick(site, use, seen[use.batch]))
        seen[use.batch] += 1
    samples = np.concatenate([sample for _, _, sample in picks])
    if inputs is None:
        X = references.inputs[site.name]
    else:
        batched = ((n, adapter.batched(layer, x, site.batch_axis)) for n, x in inputs)
        rows = {
            number: adapter.input_rows(layer, x, *picks[number][:2])
            for number, x in _matched(uses, batched)
        }
        kept = np.repeat([i in rows for i in range(len(uses))], [len(pick[2]) for pick in picks])
        counts = sampler.group.objects(int(kept.sum()))
        if sum(counts) < 2 or not all(counts):
            raise ModelError(
                complain(
                    f"a model that no longer calls {site.name} as before, once layers in front of"
                    " it are compressed",
                    "the same path through the model",
                    "Pass asymmetric=False.",
                )
            )
        X = _joined(list(rows.values()), references.resident)
        if not kept.all():
            targets, samples = targets[kept], samples[kept]
    if np.any(np.diff(samples) < 0):  # several uses: bring each sample's rows together
        order = np.argsort(samples, kind="stable")
        X, targets, samples = X[order], targets[order], samples[order]
    return split(
        adapter.groups(layer),
        layer.weight,
        layer.bias,
        X,
        targets,
        activation=site.activation,
        kernel_size=adapter.kernel_size(layer),
        sample_ids=samples,
        sample_count=sampler.sample_count,
        group=sampler.group,
    )


def response_energies(
    references: References, site: LayerSite, groups: int, ranks: Group = ALONE
) -> list[float]:
    """``||Y||^2`` of each group of a layer's responses after the activation, on all ranks."""
    if groups == 1:
        return [1.0]
    Z = torch.as_tensor(references.linear_targets[site.name]).cpu().numpy()
    Y = activations.get(site.activation).value(NumpyOps(), Z)
    own = np.array([(part**2).sum() for part in np.split(Y, groups, axis=1)])
    return (ranks.sum((own,))[0] + 1e-30).tolist()


def _matched(uses: list[Use], inputs: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """(number of the use, input) where the input is as it was in the original.

    Control flow that depends on values may call a layer more or less often, or on other shapes.
    """
    numbers: dict[int, list[int]] = {}
    for number, use in enumerate(uses):
        numbers.setdefault(use.batch, []).append(number)
    seen: Counter[int] = Counter()
    for batch, x in inputs:
        mine, call = numbers.get(batch, []), seen[batch]
        seen[batch] += 1
        if call < len(mine) and tuple(x.shape) == uses[mine[call]].input_shape:
            yield mine[call], x
