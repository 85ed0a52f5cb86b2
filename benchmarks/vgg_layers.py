"""The VGG-16 of the benchmarks, layer by layer: calibration arrays, compressed copies, mixtures.

In: the checkpoint and the data set. Out: a `LayerIO` of every layer (with the original's inputs,
as single layers are compared), kept in a cache folder; whole compressed models, kept there too;
and the logits of many mixtures of two networks in one walk over the images: as they share the
layers in front of where they part, each mixture costs only what comes after.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import slr_gpu
from benchmarks.contenders import Contender
from benchmarks.data import Comparison, calibration_images, compare, fashion_mnist, to_inputs
from benchmarks.models import load_weights, vgg16
from benchmarks.store import fingerprint
from slr_gpu.calibration import as_batches
from slr_gpu.capture import Sampler, layer_parts, record_references
from slr_gpu.errors import InputError, complain
from slr_gpu.graph import LayerSite, find_sites, fold_batch_norm
from slr_gpu.report import Report
from slr_gpu.storage import load_json

# A mixture: at this position of the trunk, these modules take over.
Branch = tuple[int, list[nn.Module]]

BATCH = 100


def default_cache() -> Path:
    """A folder outside the repository: ``$XDG_CACHE_HOME``, or ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "slr_gpu" / "benchmarks"


@dataclass(frozen=True)
class Setting:
    """What results depend on.

    Attributes
    ----------
    weights, data : Path
        Checkpoint, and folder of the data set (None for the usual place).
    images, samples, seed : int
        Calibration images, rows sampled a layer, and the seed of both.
    test_images : int
        The first so many.
    cache : Path
    quick : bool
        A trial: few iterations, and the deep layers stay dense.
    """

    weights: Path
    data: Path | None = None
    images: int = 3000
    samples: int = 15_000
    seed: int = 0
    test_images: int = 10_000
    cache: Path = field(default_factory=default_cache)
    quick: bool = False


class VGG:
    """The network with its BatchNorms folded.

    Parameters
    ----------
    setting : Setting

    Attributes
    ----------
    source, original : nn.Module
        As it was trained, and with its BatchNorms folded.
    names : list of str
        Modules in the order in which they run, one after another.
    layers : dict of str to str
        Layers that are compressed (all but the first and the last), ``conv1-2`` to ``linear2``,
        and their modules' names.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.source = load_weights(vgg16(), setting.weights)
        self.original = load_weights(vgg16(), setting.weights)
        one = torch.zeros(1, 1, 32, 32)
        with torch.no_grad():
            self.sites: dict[str, LayerSite] = find_sites(self.original, lambda: self.original(one))
        for site in self.sites.values():
            if site.batch_norm:
                fold_batch_norm(self.original, site)
        self.names = [
            f"{part}.{name}"
            for part, block in self.original.named_children()
            for name, _ in block.named_children()
        ]
        labels = layer_labels(self.original, self.names)
        self.layers = dict(list(labels.items())[1:-1])

    @cached_property
    def calibration(self) -> Tensor:
        images = fashion_mnist(self.setting.data)[0]
        return to_inputs(calibration_images(images, self.setting.images, self.setting.seed))

    @cached_property
    def test(self) -> tuple[Tensor, np.ndarray]:
        """Test inputs and labels. For figures of merit only, never for a choice."""
        _, _, images, labels = fashion_mnist(self.setting.data)
        return to_inputs(images[: self.setting.test_images]), labels[: self.setting.test_images]

    @cached_property
    def checkpoint(self) -> str:
        """Hash of the checkpoint."""
        return hashlib.sha256(self.setting.weights.read_bytes()).hexdigest()[:12]

    def fingerprint(self, **settings: Any) -> str:
        """Of the calibration and of what else a piece of work depends on."""
        s = self.setting
        return fingerprint(
            checkpoint=self.checkpoint,
            calibration=(s.images, s.samples, s.seed),
            quick=s.quick,
            **settings,
        )

    # -- calibration arrays --------------------------------------------------------------------

    def layer_io(self, label: str) -> slr_gpu.LayerIO:
        """The arrays around a layer, from the cache once they have been captured."""
        path = self.setting.cache / f"{label}-{self.fingerprint()}.safetensors"
        if not path.exists():
            name = self.layers[label]
            site = self.sites[name]
            batches = as_batches(self.calibration, self.original, BATCH)
            sizes = [len(batch[0]) for batch in batches]
            sampler = Sampler(self.setting.samples, sizes, self.setting.seed)
            references = record_references(
                self.original, batches, [site], sampler, with_inputs=True
            )
            layer = self.original.get_submodule(name)
            layer_parts(layer, site, references, sampler, None)[0].save(path)
        return slr_gpu.LayerIO.load(path)

    # -- whole models --------------------------------------------------------------------------

    def compressed(
        self,
        keep: dict[str, float],
        contender: Contender,
        asymmetric: bool,
        **options: Any,
    ) -> tuple[nn.Module, Report]:
        """The network compressed by `slr_gpu.compress`, from the cache once it has been made.

        `options` are further arguments of it; every layer gets the same share unless they say
        otherwise, and all sizes are free.

        Raises
        ------
        InputError
            For U V alone, which is not a form that a whole network can be asked for.
        """
        if contender.low_rank_only:
            raise InputError(
                complain(f"{contender.label!r} for a network", "a form of its own", "Use Zhang.")
            )
        solver, form = contender.solver(self.setting.quick), contender.form
        options = {"allocation": "uniform", "multiple": 1} | options
        settings = {"keep": keep, "solver": solver, "form": form, "asymmetric": asymmetric}
        settings |= options
        folder = self.setting.cache / f"vgg16-{self.fingerprint(**settings)}"
        # The plan is written last: with it, the folder is complete.
        if not (folder / "plan.json").exists():
            slr_gpu.compress(
                self.source,
                self.calibration,
                keep,
                solver=solver,
                form=form,
                asymmetric=asymmetric,
                samples=self.setting.samples,
                seed=self.setting.seed,
                batch_size=BATCH,
                progress=False,
                **options,
            ).save(folder)
        model = slr_gpu.load(folder, vgg16)
        return model, Report.from_dict(load_json(folder / "report.json"))

    # -- mixtures ------------------------------------------------------------------------------

    def chain(self, model: nn.Module) -> list[nn.Module]:
        """The modules of a copy of the network in the order in which they run."""
        return [model.get_submodule(name) for name in self.names]

    def position(self, label: str) -> int:
        """Where a layer stands in the chain."""
        return self.names.index(self.layers[label])

    @cached_property
    def logits(self) -> Tensor:
        """Of the original, on the test images."""
        return branch_logits([], {"": (0, self.chain(self.original))}, self.test[0])[""]

    @cached_property
    def accuracy(self) -> float:
        """Of the original, on the test images."""
        return compare(self.logits, self.logits, self.test[1]).accuracy

    def compare_branches(
        self, trunk: list[nn.Module], branches: dict[str, Branch]
    ) -> dict[str, Comparison]:
        """Each mixture beside the original, on the test images."""
        inputs, labels = self.test
        mixtures = branch_logits(trunk, branches, inputs)
        return {name: compare(self.logits, new, labels) for name, new in mixtures.items()}

    def drop(self, comparison: Comparison) -> float:
        """Points of accuracy lost."""
        return 100 * (self.accuracy - comparison.accuracy)


def layer_labels(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """``conv<stage>-<number>`` and ``linear<number>`` of the layers, in order."""
    labels, stage, number, linear = {}, 1, 0, 0
    for name in names:
        module = model.get_submodule(name)
        if isinstance(module, nn.MaxPool2d):
            stage, number = stage + 1, 0
        elif isinstance(module, nn.Conv2d):
            number += 1
            labels[f"conv{stage}-{number}"] = name
        elif isinstance(module, nn.Linear):
            linear += 1
            labels[f"linear{linear}"] = name
    return labels


@torch.inference_mode()
def branch_logits(
    trunk: list[nn.Module], branches: dict[str, Branch], inputs: Tensor, batch: int = BATCH
) -> dict[str, Tensor]:
    """Logits of mixtures of networks that are chains of modules.

    Parameters
    ----------
    trunk : list of nn.Module
        Runs once over the inputs, as far as the last branch needs.
    branches : dict of str to (position, modules)
        From ``trunk[:position]`` the result goes through these modules.
    inputs : Tensor, (N, ...)
    batch : int

    Returns
    -------
    dict of str to Tensor, (N, classes)
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in branches}
    last = max(position for position, _ in branches.values())
    for x in inputs.split(batch):
        for position in range(last + 1):
            for name, (start, modules) in branches.items():
                if start == position:
                    y = x
                    for module in modules:
                        y = module(y)
                    parts[name].append(y)
            if position < last:
                x = trunk[position](x)
    return {name: torch.cat(part) for name, part in parts.items()}


def prefix_branches(
    compressed: list[nn.Module], original: list[nn.Module], positions: Sequence[int]
) -> dict[str, Branch]:
    """With ``compressed`` as the trunk: the first j compressed layers, then the original.

    Parameters
    ----------
    positions : sequence of int
        Where the compressed layers stand in both chains, ascending.

    Returns
    -------
    dict
        Keys ``"0"`` (the original) to ``str(len(positions))`` (all layers compressed).
    """
    cuts = [0, *(position + 1 for position in positions)]
    return {str(j): (cut, original[cut:]) for j, cut in enumerate(cuts)}


def single_branch(original: list[nn.Module], position: int, module: nn.Module) -> Branch:
    """With ``original`` as the trunk: the original with one module replaced."""
    return position, [module, *original[position + 1 :]]
