"""FLOPs of a model as torch counts them: two a multiply-add.

In: a model and a batch. Out: the FLOPs of one call, in total and by module.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .batches import Batch, run_model

# The kernel of scaled_dot_product_attention that CPUs use is missing in torch's list.
_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **settings: sdpa_flop_count(q, k, v)
    )
}


def count_flops(model: nn.Module, batch: Batch) -> tuple[int, dict[str, int]]:
    """Count the FLOPs of one call.

    Parameters
    ----------
    model : nn.Module
    batch : Batch

    Returns
    -------
    total : int
    by_module : dict of str to int
        Each with all that is inside of it, under the first of its names; ``""`` for the model
        itself.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    # It fails on modules that are called with a trainable parameter.
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with torch.no_grad(), counter:
            run_model(model, batch)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    root = type(model).__name__
    counted = {
        name.removeprefix(f"{root}.") if name != root else "": sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
    }
    # Of a module with several names torch may take another one.
    first, by_module = {}, Counter()
    for name, module in model.named_modules(remove_duplicate=False):
        by_module[first.setdefault(module, name)] += counted.get(name, 0)
    return counter.get_total_flops(), dict(by_module)
