"""A model made ready: a copy with BatchNorms folded, and what of it can be compressed.

In: the user's model, calibration data and `Settings`. Out: a `Prepared`, on which `analyze` and
`apply` work: the copy that is changed layer by layer, an original beside it, the layers that are
compressed with their costs, and why the others are not. The user's model is never changed.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .adapters import adapter_for
from .batches import Batch, Batches, by_position, first_samples, first_tensor, run_model
from .budget import LayerCost
from .calibration import as_batches
from .capture import References, Sampler, record_references
from .errors import InputError, ModelError, complain
from .flops import count_flops
from .graph import LayerSite, find_sites, fold_batch_norm
from .layer_budget import LayerBudget
from .lowering import lower
from .ops import get_ops
from .parallel import ALONE, Group
from .progress import Advance
from .settings import Settings
from .spill import Spill
from .user_model import check_model, working_copy


class Prepared:
    """A model and its calibration data, ready to be analysed or compressed.

    Parameters
    ----------
    model : nn.Module
    calibration_data : see `slr_gpu.calibration.as_batches`
    settings : Settings
    device : str
    group : Group
        The ranks that share the work; each keeps its share of the batches.
    spill_dir, memory_limit
        See `slr_gpu.compress`.

    Attributes
    ----------
    source : nn.Module
        The user's.
    original, work : nn.Module
        Copies in eval mode, BatchNorms folded; layers of `work` get replaced.
    lowered : dict of str to str
        What `slr_gpu.lowering` did to modules, by name.
    sites : dict of str to LayerSite
    reasons : dict of str to str
        Why layers stay dense.
    chosen : list of LayerSite
        The layers that are compressed, in the order of execution.
    options : dict of str to dict
        The user's overrides by the name of a layer.
    costs : dict of str to LayerCost
        Of the chosen layers.
    dense_flops : (int, dict of str to int)
        Of the original, in all and by module; see `slr_gpu.flops.count_flops`.
    totals : dict of str to float
        What the whole dense model costs.
    batches : Batches
        Of this rank, by numbers and sizes of all ranks' batches.
    sample_count : int
        On all ranks.
    sampler : Sampler
    spill : Spill
        Where activations wait; a context, closed after each use.

    Raises
    ------
    InputError, ModelError, BackendError
        See `slr_gpu.compress`.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration_data: Any,
        settings: Settings,
        device: str,
        group: Group = ALONE,
        *,
        spill_dir: str | Path | None = None,
        memory_limit: float | None = None,
    ) -> None:
        self.group = group
        with group.together():
            device = group.place(device)
            self._prepare(model, calibration_data, settings, device, spill_dir, memory_limit)

    def _prepare(
        self,
        model: nn.Module,
        calibration_data: Any,
        settings: Settings,
        device: str,
        spill_dir: str | Path | None,
        memory_limit: float | None,
    ) -> None:
        check_model(model)
        self.settings, self.source = settings, model
        self.ops = get_ops(device)
        self.spill = Spill(spill_dir, memory_limit, self.ops.device)
        self._share(as_batches(calibration_data, model, settings.batch_size, memory_limit))
        self.work = working_copy(model, self.batches.first)
        if self.ops.device != "cpu":
            self.work.to(self.ops.device)
        self.lowered = lower(self.work)
        self.sites = self._sites()
        for site in self.sites.values():
            if site.batch_norm is not None and adapter_for(self.work.get_submodule(site.name)):
                fold_batch_norm(self.work, site)
        self.original = copy.deepcopy(self.work)
        self.reasons = _reasons(self.work, self.sites, settings.ignore, settings.keep_ends)
        self.chosen = [site for name, site in self.sites.items() if name not in self.reasons]
        self.options = _options(settings.overrides, [site.name for site in self.chosen])
        if not self.chosen:
            raise InputError(
                complain(
                    "a model without a layer to compress: "
                    + ("; ".join(f"{n}: {r}" for n, r in self.reasons.items()) or "no layers"),
                    "at least one convolution or linear layer",
                    "Check ignore=, or pass keep_ends=False.",
                )
            )
        self.costs = {
            site.name: _cost(site, self.work.get_submodule(site.name)) for site in self.chosen
        }
        self.dense_flops = count_flops(self.original, self.first_sample)
        self.totals = {
            "params": sum(p.numel() for p in self.original.parameters()),
            "flops": self.dense_flops[0] / 2,
        }
        sizes = list(self.batches.sizes)
        self.sampler = Sampler(settings.samples, sizes, settings.seed, self.group)
        self._references: References | None = None

    def _share(self, batches: Batches) -> None:
        """Keep this rank's batches."""
        if len(batches) < self.group.size:
            raise InputError(
                complain(
                    f"{len(batches)} calibration batch(es) for {self.group.size} ranks",
                    "at least one for each",
                    "Use fewer ranks, or a smaller batch_size.",
                )
            )
        self.sample_count = sum(batches.sizes)
        self.batches = batches
        if self.group.size > 1:
            self.batches = batches.subset(self.group.share(len(batches)))

    @property
    def first_sample(self) -> Batch:
        return first_samples(self.batches.first, 1)

    @property
    def few_samples(self) -> Batch:
        """What shows every rank what the model returns."""
        return first_samples(self.batches.first, 8)

    @property
    def example(self) -> Batch:
        """Two samples, so that exporting need not take a batch of one for a constant."""
        return tuple(
            item.detach().cpu().clone() if isinstance(item, torch.Tensor) else item
            for item in by_position(self.source, first_samples(self.batches.first, 2))
        )

    def form(self, name: str, budget: LayerBudget | None = None) -> str:
        """The form asked for; ``auto`` where it does not apply, or is always over the budget."""
        form = self.options.get(name, {}).get("form", self.settings.form)
        budget = self.costs[name].budget({}) if budget is None else budget
        return form if form == "auto" or budget.allows(form) else "auto"

    def notes(self, name: str) -> list[str]:
        """What should be said about a layer whatever becomes of it."""
        form = self.options.get(name, {}).get("form", self.settings.form)
        other = name in self.costs and self.form(name) != form
        lowered = self.lowered.get(name) or self.lowered.get(name.rpartition(".")[0], "")
        found = (f"form {form} does not apply" if other else "", self.sites[name].note, lowered)
        return [note for note in found if note]

    def references(self, advance: Advance = lambda samples: None) -> References:
        """The original's responses of all chosen layers, from one pass that is made once."""
        if self._references is None:
            with self.group.together():
                self._references = record_references(
                    self.original,
                    self.batches,
                    self.chosen,
                    self.sampler,
                    with_inputs=not self.settings.asymmetric,
                    ops=self.ops,
                    advance=lambda samples: advance(samples * self.group.size),
                )
                self._check_reached(self._references)
        else:
            advance(self.sample_count)
        return self._references

    def _check_reached(self, references: References) -> None:
        missing = [site.name for site in self.chosen if not references.uses[site.name]]
        if missing:
            raise ModelError(
                complain(
                    f"calibration data that never reach {', '.join(missing)}",
                    "some that do, on every rank",
                    "Use fewer ranks, or leave these layers out by ignore=.",
                )
            )

    def _sites(self) -> dict[str, LayerSite]:
        """All layers; those whose one input row is the same for every sample stay dense.

        Of which dimension the samples are shows where there are two of them.
        """
        work, batch = self.work, self.batches.first

        def watched(count: int) -> dict[str, LayerSite]:
            with torch.no_grad():
                return find_sites(work, lambda: run_model(work, first_samples(batch, count)))

        sites = watched(1)
        if len(first_tensor(batch)) > 1:
            for name, other in watched(2).items():
                sites[name].batch_axis = _batch_axis(sites[name], other)
                if other.calls and _rows(sites[name], work) == _rows(other, work) == 1:
                    sites[name].dense = sites[name].dense or "its input is the same for all samples"
        return sites


def _batch_axis(one: LayerSite, two: LayerSite) -> int:
    """The axis that is twice as long for two samples, in the inputs of all uses; else 0."""

    def doubled(a: tuple[int, ...], b: tuple[int, ...]) -> list[int]:
        return [] if len(a) != len(b) else [i for i in range(len(a)) if b[i] == 2 * a[i] != a[i]]

    found = [doubled(a, b) for (a, _), (b, _) in zip(one.shapes, two.shapes, strict=False)]
    axes = {tuple(axes) for axes in found}
    return axes.pop()[0] if len(axes) == 1 and len(found[0]) == 1 else 0


def _match(pattern: str, names: list[str], what: str) -> list[str]:
    found = fnmatch.filter(names, pattern)
    if not found:
        raise InputError(
            complain(f"{what}={pattern!r}", f"a name or pattern of {', '.join(names)}", "Check it.")
        )
    return found


def _reasons(
    model: nn.Module, sites: dict[str, LayerSite], ignore: tuple[str, ...], keep_ends: bool
) -> dict[str, str]:
    """Why layers stay dense, by name."""
    reasons: dict[str, str] = {}
    names = list(sites)
    for pattern in ignore:
        for name in _match(pattern, names, "ignore"):
            reasons[name] = "ignored by name"
    ran = [name for name, site in sites.items() if site.calls]
    for name, site in sites.items():
        if site.dense:
            reasons.setdefault(name, site.dense)
        elif not _cost(site, model.get_submodule(name)).compressible:
            reasons.setdefault(name, "too small: no decomposition is smaller")
    if keep_ends and ran:
        reasons.setdefault(ran[0], "first layer")
        reasons.setdefault(ran[-1], "last layer")
    return reasons


def _options(overrides: dict[str, dict[str, Any]], names: list[str]) -> dict[str, dict]:
    """The overrides by the name of a layer."""
    options: dict[str, dict[str, Any]] = {}
    for pattern, option in overrides.items():
        for name in _match(pattern, names, "overrides"):
            options.setdefault(name, {}).update(option)
    return options


def _rows(site: LayerSite, model: nn.Module) -> int:
    """Output rows of all uses together."""
    n = len(model.get_submodule(site.name).weight)
    return sum(math.prod(shape) // n for _, shape in site.shapes)


def _cost(site: LayerSite, layer: nn.Module) -> LayerCost:
    adapter = adapter_for(layer)
    taps, groups = math.prod(adapter.kernel_size(layer)), adapter.groups(layer)
    before = after = between = 0
    for shapes in site.shapes:
        x, y = (adapter.batched(layer, torch.empty(shape, device="meta")) for shape in shapes)
        before += len(x) * adapter.positions(layer, x)
        after += len(y) * adapter.positions(layer, y)
        between += len(y) * adapter.spatial_positions(layer, x, y)
    return LayerCost(
        site.name,
        len(layer.weight) // groups,
        layer.weight[0].numel() // taps,
        taps,
        after,
        before,
        adapter.kernel_size(layer),
        between,
        groups,
        len(layer.weight) if layer.bias is None else 0,
    )
