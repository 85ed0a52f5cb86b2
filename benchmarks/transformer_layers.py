"""Linear layers of a small trained transformer against alternating sparse + low-rank.

In: nothing; two language models of characters, with GELU and with SiLU, are trained here on the
source of Python's standard library. Out, for every linear layer and budget, errors
``||Y - r(Z)||^2 / ||Y||^2`` on text that no fit sees:

- before the activation, `fit(objective="linear")` and `Grebsmo` beside the baseline: 80 rounds of
  hard threshold and truncated SVD on the weight scaled by the root mean square of its inputs
  (as OATS, Zhang and Papyan 2024), for single entries or whole columns, at the best of several
  ranks, chosen on that text in its favour;
- after it, the fit through the activation beside the fit that ignores it.

    python -m benchmarks.transformer_layers --out benchmarks/results/transformer_layers.json
"""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import nn

import slr_gpu

ROUNDS = 80
# Shares of the budget that the baseline spends on its low-rank part; the best one counts.
SHARES = (0.1, 0.25, 0.5)
CONTEXT = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int, activation: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed, (batch, length, width) = self.norm1(x), x.shape
        q, k, v = (
            layer(normed).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(self.activation(self.up(self.norm2(x))))


class Characters(nn.Module):
    """A decoder of bytes."""

    def __init__(self, activation: nn.Module, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, 4, activation) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def source_text() -> torch.Tensor:
    """Bytes of the standard library's modules, in order of their names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def windows(text: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(text) - CONTEXT - 1, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def train(model: nn.Module, text: torch.Tensor, steps: int) -> float:
    """Adam with a one-cycle rate; the last loss in nats a character."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        tokens = windows(text, 32, generator)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(loss.detach())


@torch.no_grad()
def layer_inputs(model: nn.Module, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """The rows that every linear layer reads."""
    found, hooks = {}, []
    for name, module in model.blocks.named_modules():
        if isinstance(module, nn.Linear):

            def keep(module, inputs, output, name=name):
                found[name] = inputs[0].flatten(0, -2).numpy()

            hooks.append(module.register_forward_hook(keep))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def alternating(
    weight: np.ndarray, scale: np.ndarray, entries: int, rank: int, *, columns: bool = False
) -> np.ndarray:
    """Sparse + low rank nearest to a scaled weight, by alternation, and scaled back.

    Parameters
    ----------
    weight : array, (n, m)
    scale : array, (m,)
        Of the columns.
    entries, rank : int
        Numbers in the sparse part; rank of the other.
    columns : bool
        Whole columns instead of single entries.
    """
    scaled = weight * scale
    sparse = np.zeros_like(scaled)
    for _ in range(ROUNDS):
        U, sigma, V = np.linalg.svd(scaled - sparse, full_matrices=False)
        low_rank = (U[:, :rank] * sigma[:rank]) @ V[:rank]
        rest = scaled - low_rank
        scores = (rest**2).sum(axis=0, keepdims=True) if columns else rest**2
        count = entries // len(weight) if columns else entries
        mask = np.zeros(scores.size, bool)
        mask[np.argsort(-scores.ravel())[:count]] = True
        sparse = np.where(mask.reshape(scores.shape), rest, 0)
    return (low_rank + sparse) / scale


def baseline(
    layer_io: slr_gpu.LayerIO, keep: float, *, columns: bool, price: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases of the alternation at several splits; entries cost `price` numbers."""
    weight, inputs = layer_io.weight.astype("f8"), layer_io.inputs.astype("f8")
    n, m = weight.shape
    scale, mean = np.sqrt((inputs**2).mean(axis=0)) + 1e-8, inputs.mean(axis=0)
    found = []
    for share in SHARES:
        rank = int(share * keep * n * m / (n + m))
        entries = int((keep * n * m - rank * (n + m)) / price)
        M = alternating(weight, scale, entries, rank, columns=columns)
        found.append((M, layer_io.bias + (weight - M) @ mean))
    return found


def error(layer_io: slr_gpu.LayerIO, inputs: np.ndarray, M: np.ndarray, bias: np.ndarray) -> float:
    """Error after the activation on other rows."""
    ops, value = layer_io.ops, layer_io.activation.value
    wanted = value(ops, inputs @ layer_io.weight.T + layer_io.bias)
    missed = wanted - value(ops, (inputs @ M.T + bias).astype(wanted.dtype))
    return float((missed**2).sum() / (wanted**2).sum())


def compare(linear: slr_gpu.LayerIO, unseen: np.ndarray, keep: float) -> dict[str, float]:
    """Errors of the linear objective, ours and the baselines', by name."""

    def ours(**settings) -> float:
        fitted = slr_gpu.fit(linear, keep=keep, **settings)
        return error(linear, unseen, fitted.to_dense(), fitted.bias)

    def theirs(**settings) -> float:
        return min(error(linear, unseen, *found) for found in baseline(linear, keep, **settings))

    return {
        "fit": ours(),
        "grebsmo, values": ours(solver=slr_gpu.Grebsmo(indices=False)),
        "grebsmo, values and places": ours(solver=slr_gpu.Grebsmo()),
        "alternating columns": theirs(columns=True, price=1),
        "alternating entries, values": theirs(columns=False, price=1),
        "alternating entries, values and places": theirs(columns=False, price=2),
    }


def main(
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 600,
    rows: Annotated[int, typer.Option(help="Windows of text for calibration.")] = 96,
) -> None:
    """Train, fit, and print one line a layer and budget."""
    text, entries = source_text(), []
    generator = torch.Generator().manual_seed(1)
    cut = len(text) * 9 // 10
    for name, activation in (("gelu", nn.GELU()), ("silu", nn.SiLU())):
        torch.manual_seed(0)
        model = Characters(activation)
        loss = train(model, text[:cut], steps)
        inputs = layer_inputs(model, windows(text[:cut], rows, generator)[:, :-1])
        unseen = layer_inputs(model, windows(text[cut:], rows, generator)[:, :-1])
        for layer, X in inputs.items():
            module = model.blocks.get_submodule(layer)
            arrays = module.weight.detach().numpy(), module.bias.detach().numpy(), X
            linear = slr_gpu.LayerIO(*arrays, activation="identity")
            for keep in (0.5, 0.25):
                entry = {"model": name, "loss": loss, "layer": layer, "keep": keep}
                entry["linear"] = compare(linear, unseen[layer], keep)
                if layer.endswith("up"):
                    through = slr_gpu.LayerIO(*arrays, activation=name)
                    for objective in ("linear", "activation"):
                        fitted = slr_gpu.fit(through, keep=keep, objective=objective)
                        found = error(through, unseen[layer], fitted.to_dense(), fitted.bias)
                        entry[f"after {name}, {objective}"] = found
                        entry["notes"] = list(fitted.notes)
                entries.append(entry)
                print(json.dumps(entry), flush=True)
    if out is not None:
        out.write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
