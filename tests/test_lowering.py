"""What hides weights is taken away in the copy; the function stays."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import slr_gpu
from slr_gpu.attention import Attention
from slr_gpu.lowering import lower, non_leaf_tensors

MASKS = {
    "none": None,
    "boolean": torch.tensor([[True, False, False, False, True, False, False]] * 5),
    "added": torch.linspace(-2, 2, 35).reshape(5, 7),
    "each head": torch.linspace(-2, 2, 210).reshape(6, 5, 7),
}
PADDING = {"none": None, "some": torch.arange(7)[None] >= torch.tensor([[7], [5], [6]])}


def same(got, expected):
    assert (got[1] is None) == (expected[1] is None)
    for a, b in zip(got, expected, strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("key_size", [None, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_attention_equals_multihead_attention(batch_first, key_size, bias):
    torch.manual_seed(0)
    source = nn.MultiheadAttention(
        8, 2, bias=bias, kdim=key_size, vdim=key_size, batch_first=batch_first
    ).eval()
    if bias:
        nn.init.normal_(source.in_proj_bias)
    attention = Attention(source)
    q, k = torch.randn(3, 5, 8), torch.randn(3, 7, key_size or 8)
    same(attention(q[0], k[0], k[0]), source(q[0], k[0], k[0]))
    if not batch_first:
        q, k = q.transpose(0, 1), k.transpose(0, 1)
    for mask, padding, (weights, mean) in itertools.product(
        MASKS.values(), PADDING.values(), ((True, True), (True, False), (False, True))
    ):
        settings = {
            "attn_mask": mask,
            "key_padding_mask": padding,
            "need_weights": weights,
            "average_attn_weights": mean,
        }
        same(attention(q, k, k, **settings), source(q, k, k, **settings))
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    settings = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    if key_size is None:
        same(attention(q, q, q, **settings), source(q, q, q, **settings))


def test_encoder_keeps_its_function_and_leaves_the_fused_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    lowered = copy.deepcopy(encoder)
    notes = lower(lowered)
    assert set(notes) == {"layers.0.self_attn", "layers.1.self_attn"}
    x, padding = torch.randn(3, 5, 8), torch.arange(5)[None] >= torch.tensor([[5], [3], [4]])
    called = []
    lowered.layers[0].linear1.register_forward_hook(lambda *a: called.append(1))
    with torch.no_grad():
        torch.testing.assert_close(lowered(x), encoder(x), rtol=1e-4, atol=1e-5)
        got = lowered(x, src_key_padding_mask=padding)
        expected = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], expected[~padding], rtol=1e-4, atol=1e-5)
    assert len(called) == 2


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


def frozen(layer):
    return parametrizations.weight_norm(layer).requires_grad_(False)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", 0.5)


NORMS = {
    "weight_norm": old_weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "WeightNorm": parametrizations.weight_norm,
    "WeightNorm, frozen": frozen,
    "SpectralNorm": parametrizations.spectral_norm,
    "Orthogonal": parametrizations.orthogonal,
    "pruning": pruned,
}


def normed(norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        norm(nn.Conv2d(8, 8, 3, padding=1)),
        nn.ReLU(),
        nn.Flatten(),
        norm(nn.Linear(128, 16)),
        nn.ReLU(),
        nn.Linear(16, 3),
    )


@pytest.mark.parametrize("name", NORMS)
def test_parametrizations_are_removed_in_the_copy_alone(name, tmp_path):
    norm = NORMS[name]
    data = torch.randn(50, 2, 4, 4)
    model = normed(norm)
    model(data)
    model.eval()
    before = model(data)
    state, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    lowered = copy.deepcopy(model, non_leaf_tensors(model))
    lower(lowered)
    torch.testing.assert_close(lowered(data), before, rtol=1e-5, atol=1e-6)
    assert type(lowered[2]) is nn.Conv2d and isinstance(lowered[2].weight, nn.Parameter)
    assert not lowered[2]._forward_pre_hooks and not hasattr(lowered[2], "parametrizations")
    result = slr_gpu.compress(model, data, {"params": 0.7}, allocation="uniform", progress=False)
    rows = {row.name: row for row in result.report.layers}
    assert rows["2"].compressed and rows["5"].compressed
    for row in ("2", "5"):
        assert any(f"{name.partition(',')[0]} removed" in note for note in rows[row].notes)
    result.save(tmp_path)
    again = slr_gpu.load(tmp_path, lambda: normed(norm))
    torch.testing.assert_close(again(data), result.model(data))
    # The user's model is as it was, and works.
    torch.testing.assert_close(model(data), before)
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_attention_that_cannot_be_split_is_left_and_listed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.middle = nn.Linear(6, 8), nn.Linear(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = self.middle(torch.relu(self.stem(x)))
            return self.head(self.attention(x, x, x)[0])

    torch.manual_seed(0)
    report = slr_gpu.compress(
        Net().eval(), torch.randn(40, 5, 6), {"params": 0.95}, progress=False
    ).report
    rows = {row.name: row for row in report.layers}
    assert rows["middle"].compressed
    row = rows["attention"]
    assert row.type == "MultiheadAttention" and row.reason == "a bare parameter is not compressed"
    assert row.flops > 2 * 5 * 8 * 24 and row.shape == "24x8"
    assert report.skipped_flops == report.flops - rows["middle"].flops


def test_transposed_linear_layers_of_transformers(monkeypatch):
    class Conv1D(nn.Module):
        def __init__(self, n, m):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(m, n)), nn.Parameter(torch.randn(n))

        def forward(self, x):
            return x @ self.weight + self.bias

    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")
    model = nn.Sequential(Conv1D(8, 4), nn.GELU(), Conv1D(3, 8)).eval()
    lowered, x = copy.deepcopy(model), torch.randn(5, 4)
    lower(lowered)
    assert type(lowered[0]) is nn.Linear
    torch.testing.assert_close(lowered(x), model(x))
