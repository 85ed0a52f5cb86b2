"""int8 on top: ONNX Runtime's static quantisation takes an exported compressed network."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import slr_gpu
from slr_gpu import demo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.deployed import quantise


def test_a_compressed_network_survives_static_quantisation(tmp_path):
    pytest.importorskip("sklearn", reason="needs its digits: pip install 'slr_gpu[demo]'")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'slr_gpu[onnx]'")
    import onnx
    import onnxruntime

    images, labels, test_images, test_labels = demo.digits(0)
    torch.manual_seed(0)
    model = demo.network()
    demo.train(model, images, labels, 0)
    result = slr_gpu.compress(
        model, images, {"flops": 0.25}, allocation="uniform", samples=5000, progress=False
    )
    result.export(tmp_path / "float32.onnx", runtime=None)
    quantise(tmp_path / "float32.onnx", tmp_path / "int8.onnx", images[:200].numpy())
    kinds = {node.op_type for node in onnx.load(tmp_path / "int8.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= kinds

    def accuracy(name):
        session = onnxruntime.InferenceSession(str(tmp_path / name))
        (entry,) = session.get_inputs()
        (outputs,) = session.run(None, {entry.name: test_images.numpy()})
        return float(np.mean(outputs.argmax(1) == test_labels.numpy()))

    assert accuracy("float32.onnx") > 0.95
    assert accuracy("int8.onnx") >= accuracy("float32.onnx") - 0.005
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "float32.onnx").stat().st_size
