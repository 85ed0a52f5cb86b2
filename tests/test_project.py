"""Import directions, what the wheel carries, and the README's example."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "slr_gpu"

# Data flows from left to right (DESIGN 5): a module imports only from those before it.
ORDER = [
    "errors",
    "storage",
    "program",
    "parallel",
    "progress",
    "activations",
    "ops",
    "decomposition",
    "layer_budget",
    "shards",
    "blocks",
    "layer_io",
    "samples",
    "streamed",
    "penalties",
    "metric",
    "problem",
    "subsets",
    "support",
    "basis",
    "curves",
    "tradeoff",
    "knapsack",
    "ridge",
    "solvers",
    "fit",
    "pieces",
    "layers",
    "grouped",
    "adapters",
    "graph",
    "attention",
    "lowering",
    "batches",
    "flops",
    "spill",
    "sample_files",
    "calibration",
    "frontier",
    "capture",
    "budget",
    "shares",
    "plan_plot",
    "plan",
    "analysis",
    "output_loss",
    "user_model",
    "settings",
    "prepare",
    "checkpoint",
    "report",
    "equivalence",
    "channel_spaces",
    "channel_orders",
    "fold",
    "export",
    "runtime",
    "deploy",
    "layer_seconds",
    "latency",
    "sensitivity",
    "mixtures",
    "training",
    "refine",
    "result",
    "carry_out",
    "compress",
    "demo",
    "doctor",
    "cli_options",
    "cli_inputs",
    "batch",
    "cli",
    "__main__",
]
TORCH_FREE = ORDER[: ORDER.index("pieces")]


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts
        if name != ("__init__",):
            yield name[0], path


def imports(path: Path):
    """(top-level module of this package or other package, inside a function?)"""
    depth = len(path.relative_to(PACKAGE).parts)
    tree = ast.parse(path.read_text())
    functions = [
        n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    late = {id(child) for function in functions for child in ast.walk(function)}
    # Names for annotations alone are not imports.
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level == depth:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                for name in names:
                    yield "slr_gpu", name.split(".")[0], id(node) in late
            elif node.level == 0:
                yield node.module.split(".")[0], None, id(node) in late
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0], None, id(node) in late


def test_every_module_has_its_place():
    assert {name for name, _ in modules()} == set(ORDER)


@pytest.mark.parametrize("name,path", list(modules()), ids=lambda v: getattr(v, "stem", v))
def test_imports_point_left(name, path):
    for package, module, late in imports(path):
        if package == "slr_gpu":
            assert ORDER.index(module) <= ORDER.index(name), f"{name} imports {module}"
            if module == name:
                assert path.parent != PACKAGE
        if package == "torch" and name in TORCH_FREE:
            assert late, f"{name} imports torch"
        if package in ("cupy", "cupyx", "pynvml", "onnx", "onnxruntime", "openvino", "matplotlib"):
            assert late, f"{name} imports {package} at the top"


def test_import_works_without_optional_packages():
    blocked = ["cupy", "pynvml", "onnx", "onnxruntime", "openvino", "matplotlib", "sklearn"]
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        "import slr_gpu, slr_gpu.cli\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wheel_contents(tmp_path):
    pytest.importorskip("setuptools", reason="needs setuptools to build the wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    # Built from a copy: setuptools leaves a build folder beside its sources.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("slr_gpu", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    subprocess.run([*command, "-w", str(tmp_path), str(source)], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    expected = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py")}
    expected |= {f"slr_gpu/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.cu")}
    carried = {name for name in names if ".dist-info/" not in name}
    assert carried == expected
    assert any(path.endswith(".cu") for path in expected)


def test_readme_example_runs_as_written(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    lines = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(lines) <= 14
    (tmp_path / "example.py").write_text(blocks[0])
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "kept" in done.stdout


def test_readme_names_every_extra():
    readme = (ROOT / "README.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)[1]
    for extra in re.findall(r"^([\w-]+) =", extras, re.MULTILINE):
        assert extra in readme, extra
