"""int8 on top: ONNX Runtime's static quantisation takes an exported compressed network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import slr_gpu
from slr_gpu import demo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.data import calibration_images, fashion_mnist, to_inputs
from benchmarks.deployed import quantise
from benchmarks.models import load_weights, vgg16

CHECKPOINT = "SLR_GPU_VGG16"  # variable that names it


def accuracy(path, inputs, labels):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path))
    (entry,) = session.get_inputs()
    found = [
        session.run(None, {entry.name: batch})[0].argmax(1)
        for batch in np.array_split(inputs.numpy(), -(-len(inputs) // 100))
    ]
    return float(np.mean(np.concatenate(found) == np.asarray(labels)))


def test_a_compressed_network_survives_static_quantisation(tmp_path):
    pytest.importorskip("sklearn", reason="needs its digits: pip install 'slr_gpu[demo]'")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'slr_gpu[onnx]'")
    import onnx

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

    before, after = (
        accuracy(tmp_path / f"{kind}.onnx", test_images, test_labels)
        for kind in ("float32", "int8")
    )
    assert before > 0.95
    assert after >= before - 0.005
    assert (tmp_path / "int8.onnx").stat().st_size < (tmp_path / "float32.onnx").stat().st_size


@pytest.mark.skipif(
    CHECKPOINT not in os.environ,
    reason=f"needs the VGG-16 of benchmarks.train_fashion_mnist: {CHECKPOINT}=its path",
)
def test_the_compressed_vgg16_survives_static_quantisation(tmp_path):
    images, _, test_images, test_labels = fashion_mnist(None)
    calibration = to_inputs(calibration_images(images, 3000, 0))
    model = load_weights(vgg16(), Path(os.environ[CHECKPOINT]))
    result = slr_gpu.compress(
        model, calibration, {"flops": 0.25}, allocation="uniform", progress=False
    )
    result.export(tmp_path / "float32.onnx", runtime=None)
    quantise(tmp_path / "float32.onnx", tmp_path / "int8.onnx", calibration[:200].numpy())
    before, after = (
        accuracy(tmp_path / f"{kind}.onnx", to_inputs(test_images), test_labels)
        for kind in ("float32", "int8")
    )
    assert before > 0.93
    assert after >= before - 0.005
