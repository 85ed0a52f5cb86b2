"""Ranks: the same plan and the same weights whatever their number, and an end when one of them dies.

Ranks are forked children that meet through `slr_gpu.ranks`, as under torchrun, over gloo.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from functools import cache

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from torch import nn

import slr_gpu
from benchmarks.data_parallel import iteration_bytes
from slr_gpu import demo
from slr_gpu.ops import NumpyOps
from slr_gpu.parallel import ALONE
from slr_gpu.problem import ResponseProblem
from slr_gpu.samples import Samples
from slr_gpu.shares import pca_energies
from slr_gpu.tradeoff import TradeOff


def start(size, function):
    """Processes, each with the pipe on which it sends what a function of its group returns."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, context = [], multiprocessing.get_context("fork")
    for rank in range(size):
        ours, theirs = context.Pipe()
        process = context.Process(target=_run, args=(rank, size, port, function, theirs))
        process.start()
        started.append((process, ours))
        theirs.close()
    return started


def _run(rank, size, port, function, pipe):
    torch.set_num_threads(1)
    threadpool_limits(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        with slr_gpu.ranks() as group:
            found = function(group)
    except BaseException:
        found = traceback.format_exc()
        pipe.send_bytes(pickle.dumps((False, found)))
        raise
    pipe.send_bytes(pickle.dumps((True, found)))


def on_ranks(size, function):
    """What a function of a group returns on each of so many ranks."""
    started, found = start(size, function), []
    for process, pipe in started:
        assert pipe.poll(100), "a rank that does not end"
        fine, value = pickle.loads(pipe.recv_bytes())
        found.append((fine, value))
    for process, _ in started:
        process.join(10)
    for fine, value in found:
        assert fine, value
    return [value for _, value in found]


def arrays(rows=600, n=12, channels=6, taps=9, samples=60, seed=0):
    """A convolution's rows: inputs of few directions, noise, neighbouring rows of one sample."""
    rng = np.random.default_rng(seed)
    m = channels * taps
    X = rng.normal(size=(rows, 20)) @ rng.normal(size=(20, m)) + rng.normal(size=(rows, m))
    W = rng.normal(size=(n, channels, 3, 3) if taps == 9 else (n, m)) / m**0.5
    ids = np.sort(rng.integers(0, samples, rows))
    return W.astype("f4"), rng.normal(size=n).astype("f4"), X.astype("f4"), ids


def layer(group=ALONE, cuts=None, **sizes):
    """This rank's part of a layer: unequal parts, so that nothing relies on equal ones."""
    W, b, X, ids = arrays(**sizes)
    cuts = cuts or [round(len(X) * (i / group.size) ** 1.3) for i in range(group.size + 1)]
    own = slice(cuts[group.rank], cuts[group.rank + 1])
    targets = X @ W.reshape(len(W), -1).T + b
    return slr_gpu.LayerIO(
        W, b, X[own], linear_targets=targets[own], sample_ids=ids[own], group=group
    )


def same(one, other):
    assert one.structure == other.structure
    np.testing.assert_array_equal(one.columns, other.columns)
    scale = np.abs(one.to_dense()).max()
    assert np.abs(one.to_dense() - other.to_dense()).max() < 1e-5 * scale
    np.testing.assert_allclose(one.bias, other.bias, atol=1e-5)
    np.testing.assert_allclose(one.held_out_error, other.held_out_error, rtol=1e-4, atol=1e-8)


FITS = {
    "majorize, auto": {"keep": 0.3},
    "majorize, rotated": {"basis_rows": 4, "channels": 1, "rank": 3},
    "majorize, spatial": {"keep": 0.3, "form": "spatial"},
    "zhang": {"keep": 0.3, "solver": slr_gpu.Zhang()},
    "admm": {"columns": 10, "rank": 3, "solver": slr_gpu.ADMM(iterations=15)},
    "penalties": {"lambda1": 0.3, "lambda2": 0.1, "relative": True},
    "whitened": {"rank": 4, "solver": slr_gpu.WhitenedSVD()},
    "pruning": {"channels": 3, "rank": 0, "solver": slr_gpu.ChannelPruning()},
    "grebsmo": {"keep": 0.3, "form": "entries", "solver": slr_gpu.Grebsmo()},
}


@cache
def fits(size):
    """All of them on each rank."""
    if size == 1:
        return [_fits(ALONE)]
    return on_ranks(size, _fits)


def _fits(group):
    return {name: slr_gpu.fit(layer(group), **asked) for name, asked in FITS.items()}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", FITS)
def test_a_fit_does_not_depend_on_the_number_of_ranks(name, size):
    (alone,), found = fits(1), fits(size)
    same(alone[name], found[0][name])
    for other in found[1:]:
        np.testing.assert_array_equal(found[0][name].to_dense(), other[name].to_dense())


def test_few_rows_and_many_columns(monkeypatch):
    """By rows, cross-validated, thinned to the most rows that are taken."""
    monkeypatch.setattr("slr_gpu.problem.WIDEST", 100)
    monkeypatch.setattr("slr_gpu.problem.MOST_ROWS", 70)
    sizes = {"rows": 150, "channels": 16, "samples": 150}

    def fits(group=ALONE):
        return [slr_gpu.fit(layer(group, **sizes), **a) for a in ({"keep": 0.2}, {"channels": 3})]

    alone = fits()
    assert any("fitted on" in note for note in alone[0].notes)
    for one, other in zip(alone, on_ranks(3, fits)[1], strict=True):
        same(one, other)


def test_a_rank_may_have_no_rows_of_some_kind():
    """None held out, or none whatever."""

    def fits(group):
        cuts = ([0, 3, 600], [0, 0, 600], [0, 600, 600])
        return [slr_gpu.fit(layer(group, c), basis_rows=4, channels=1, rank=3) for c in cuts]

    for found in on_ranks(2, fits)[0]:
        same(slr_gpu.fit(layer(), basis_rows=4, channels=1, rank=3), found)


def test_rows_are_held_out_and_thinned_by_their_numbers_among_all():
    X = np.arange(120.0).reshape(60, 2)

    def rows(group, ids):
        share = group.share(60)
        own = slice(share.start, share.stop)
        sample_ids = None if ids is None else ids[own]
        part = slr_gpu.LayerIO(np.eye(2), None, X[own], sample_ids=sample_ids, group=group)
        fitted, held = part.split(0.2)
        index = np.arange(len(part.inputs))
        samples = Samples(NumpyOps(), part.inputs, X[own], None, index, np.dtype("f8"), group)
        thin = samples.thinned(7).thinned(2)
        return part.inputs[fitted, 0], part.inputs[held, 0], thin.X[:, 0], thin.rows

    for ids in (None, np.arange(60) // 7):
        *alone, count = rows(ALONE, ids)
        for size in (2, 3):
            found = on_ranks(size, lambda group: rows(group, ids))
            for number, wanted in enumerate(alone):
                joined = np.concatenate([parts[number] for parts in found])
                np.testing.assert_array_equal(joined, wanted)
            assert {parts[3] for parts in found} == {count}


def test_sums_over_ranks_are_those_over_all_rows():
    W, b, X, _ = arrays()
    alone = ResponseProblem(layer(), ops=NumpyOps())
    problems = on_ranks(3, lambda group: _formed(ResponseProblem(layer(group), ops=NumpyOps())))
    for G, rhs, loss, rows in problems:
        np.testing.assert_allclose(G, alone.G, rtol=1e-6, atol=1e-6 * np.abs(alone.G).max())
        np.testing.assert_allclose(rhs, alone.start_rhs, atol=1e-6 * np.abs(rhs).max())
        np.testing.assert_allclose(loss, alone.objective(alone.W * 0.9, alone.bias), rtol=1e-6)
        assert rows == alone.rows
        np.testing.assert_array_equal(G, problems[0][0])


def _formed(problem):
    loss = problem.objective(problem.W * 0.9, problem.bias)
    return problem.G, problem.start_rhs, loss, problem.rows


@pytest.mark.parametrize("form", ["rotated", "channels"])
def test_the_trade_off_is_judged_by_the_rows_of_all_ranks(form):
    def errors(group=ALONE):
        points = TradeOff(ResponseProblem(layer(group), ops=NumpyOps()), form).points()
        return {str(point.structure): point.error for point in points}

    alone = errors()
    for found in on_ranks(3, errors):
        assert found.keys() == alone.keys()
        for name, error in alone.items():
            assert found[name] == pytest.approx(error, rel=1e-4, abs=1e-7)


def test_energies_over_ranks():
    Z = np.random.default_rng(0).normal(size=(90, 8))
    alone = pca_energies(Z, 2)
    for found in on_ranks(3, lambda group: pca_energies(Z[group.rank :: 3], 2, group)):
        np.testing.assert_allclose(found, alone, rtol=1e-10)


def test_bytes_are_counted():
    """Those of an iteration are what the benchmark's predictions take."""

    def counted(group):
        group.sum((np.zeros((3, 4)), np.float64(1)))
        problem, before = ResponseProblem(layer(group), ops=NumpyOps()), group.reduced
        problem.held_energy  # noqa: B018
        once = group.reduced - before
        problem.sweep(problem.W, problem.bias)
        problem.held_out_error(problem.W, problem.bias)
        return group.reduced - before - once

    assert on_ranks(2, counted) == [iteration_bytes(12, 54)] * 2
    assert ALONE.sum((np.zeros(3),))[0].shape == (3,) and ALONE.reduced == 0


def test_sums_are_the_same_bits_on_all_ranks():
    def added(group):
        values = np.random.default_rng(group.rank).normal(size=100_001) * 1e9 ** (group.rank % 2)
        return group.sum((values, values[:3]))

    first, *others = on_ranks(4, added)
    for other in others:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(first, other, strict=True))


CHANGES = {
    "rank 1 with sizes = ": {"keep": 0.4},
    "rank 1 with settings = ": {"ridge": 1e-2},
    "rank 1 with another weight than rank 0": {"weight": 1},
}


def test_ranks_that_would_fit_something_else_are_refused(monkeypatch):
    """Before any work; other code too, each rank hashing the files that it runs."""

    def fits(group):
        messages = []
        for change in CHANGES.values():
            changed = dict(change) if group.rank == 1 else {}
            part = layer(group)
            part.weight = part.weight + changed.pop("weight", 0)
            with pytest.raises(slr_gpu.InputError) as error:
                slr_gpu.fit(part, **{"keep": 0.3, **changed})
            messages.append(str(error.value))
        monkeypatch.setattr("slr_gpu.parallel.versions", lambda: {"slr_gpu": f"{group.rank}" * 64})
        with pytest.raises(slr_gpu.InputError) as error:
            group.check_same(dict)
        messages.append(str(error.value))
        bad = arrays()[2]
        bad[3, 4] = np.nan if group.rank == 1 else 0
        with pytest.raises(slr_gpu.InputError, match=r"rank 1: got 1 NaN or Inf in inputs.*3, 4"):
            slr_gpu.LayerIO(arrays()[0], None, bad, group=group)
        return messages

    for messages in on_ranks(2, fits):
        for wanted, message in zip(CHANGES, messages, strict=False):
            assert wanted in message
        assert "rank 1 with another versions.slr_gpu than rank 0" in messages[-1]


def test_an_error_of_one_rank_is_one_of_all():
    def work(group):
        with pytest.raises(slr_gpu.InputError, match="^rank 2: got shard 2"):
            with group.together():
                if group.rank == 2:
                    raise slr_gpu.InputError("got shard 2")
        with pytest.raises(slr_gpu.BudgetError, match="too small"):
            group.first(_too_small)
        return group.first(lambda: group.rank)

    assert on_ranks(3, work) == [0, 0, 0]


def _too_small():
    raise slr_gpu.BudgetError("too small")


# -- whole models ------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.ReLU()]
    layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 5))


def images(count=110):
    return torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def compressed(group=ALONE, **changes):
    settings = {"keep": {"flops": 0.4}, "samples": 900, "batch_size": 15, "progress": False}
    return slr_gpu.compress(network(), images(), group=group, **{**settings, **changes})


@cache
def alone():
    return compressed()


def same_result(one, other):
    assert [layer["arguments"] for layer in one.plan["layers"]] == [
        layer["arguments"] for layer in other.plan["layers"]
    ]
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert float((weights[name] - value).abs().max()) <= 1e-5, name


def test_a_model_does_not_depend_on_the_number_of_ranks(tmp_path):
    """Eight batches of which the last is smaller, grouped layers; pieces are resumed by others."""
    for size in (2, 4):
        found = on_ranks(size, lambda group: compressed(group, checkpoint=tmp_path / f"{size}"))
        for result in found:
            same_result(alone(), result)
            for row, other in zip(result.report.layers, alone().report.layers, strict=True):
                assert row.structure == other.structure
                if row.error is not None:
                    assert row.error == pytest.approx(other.error, rel=1e-4)
    # One process goes on with what two ranks wrote: nothing is fitted again.
    pieces = {path: path.stat().st_mtime_ns for path in (tmp_path / "2").rglob("*.safetensors")}
    resumed = compressed(checkpoint=tmp_path / "2", resume=True)
    same_result(found[0], resumed)
    assert len(pieces) >= 3
    assert pieces == {p: p.stat().st_mtime_ns for p in (tmp_path / "2").rglob("*.safetensors")}


def test_a_trained_network_does_not_depend_on_the_number_of_ranks():
    """Its columns are nearly equally good, and its last layer has more of them than rows."""
    pytest.importorskip("sklearn", reason="needs its digits: pip install 'slr_gpu[demo]'")
    found, labels, *_ = demo.digits(0)
    torch.manual_seed(0)
    model = demo.network()
    demo.train(model, found, labels, 0)

    def run(group=ALONE):
        return slr_gpu.compress(model, found, {"flops": 0.25}, progress=False, group=group)

    same_result(run(), on_ranks(4, run)[0])


def test_another_allocation_and_bad_input():
    def results(group):
        found = compressed(group, allocation="pca_energy")
        messages = []
        bad = images()
        bad[100, 0, 0, 0] = float("nan")
        for changes in (
            {"samples": 900 + group.rank},
            {"seed": group.rank},
            {"batch_size": 60},
        ):
            with pytest.raises(slr_gpu.InputError) as error:
                compressed(group, **changes)
            messages.append(str(error.value))
        with pytest.raises(slr_gpu.InputError) as error:
            slr_gpu.compress(
                network(), bad, {"flops": 0.4}, batch_size=15, progress=False, group=group
            )
        return found, [*messages, str(error.value)]

    ranks = on_ranks(3, results)
    same_result(compressed(allocation="pca_energy"), ranks[0][0])
    for _, messages in ranks:
        assert "rank 1 with settings.samples = 901 (rank 0: 900)" in messages[0]
        assert "rank 2 with settings.seed = 2 (rank 0: 0)" in messages[1]
        assert "2 calibration batch(es) for 3 ranks" in messages[2]
        assert (
            "NaN or Inf in calibration batch 6, in its sample 10 (sample 100 of all)" in messages[3]
        )


def test_the_joint_refinement_on_ranks():
    """All keep the same weights; of one step on all samples, those of one process."""
    refine = slr_gpu.Refinement(epochs=1, batch_size=1000, rate=0.5, features=0)

    def refined(group):
        step = compressed(group, refine=refine)
        # Unequal parts, and several steps.
        longer = compressed(group, refine=slr_gpu.Refinement(epochs=3, batch_size=20))
        return step, longer

    (step, longer), *others = on_ranks(3, refined)
    for result in (step, longer):
        assert result.report.refinement["kept"]
    for other, _ in others:
        for name, value in step.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name])
    one = compressed(refine=refine)
    assert step.report.refinement["before"] == pytest.approx(
        one.report.refinement["before"], rel=1e-4
    )
    # All samples in one batch, whichever way they are cut: one step of the same gradient.
    for name, value in one.model.state_dict().items():
        apart = float((step.model.state_dict()[name] - value).abs().max())
        changed = float((alone().model.state_dict()[name] - value).abs().max())
        assert apart <= 1e-5 + 0.02 * changed, name
        assert changed > 1e-4 or name in ("0.weight", "0.bias", "10.weight", "10.bias")


def test_a_rank_that_dies_ends_the_job_and_leaves_what_is_finished(tmp_path):
    def dying(group):
        if group.rank == 1:
            module = sys.modules["slr_gpu.carry_out"]
            fit = module.fit

            def third(*args, **kwargs):
                if len(list(tmp_path.rglob("layers/*.safetensors"))) == 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                return fit(*args, **kwargs)

            module.fit = third
        return compressed(group, checkpoint=tmp_path)

    began = time.perf_counter()
    started = start(2, dying)
    assert started[0][1].poll(60)
    fine, message = pickle.loads(started[0][1].recv_bytes())
    for process, _ in started:
        process.join(10)
    assert time.perf_counter() - began < 60
    assert not fine and "BackendError: got no answer from another rank, on rank 0" in message
    assert "--resume" in message
    assert started[1][0].exitcode == -signal.SIGKILL
    pieces = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("layers/*.safetensors")}
    assert len(pieces) == 2
    same_result(alone(), compressed(checkpoint=tmp_path, resume=True))
    assert all(path.stat().st_mtime_ns == when for path, when in pieces.items())


def test_a_rank_that_is_told_to_stop_says_why():
    """As torchrun tells the others when one has died, some of which are computing then."""
    code = (
        "import os, signal, time\n"
        "from slr_gpu.parallel import told_to_stop\n"
        "with told_to_stop():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(30)\n"
    )
    environment = {**os.environ, "RANK": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1  # not killed
    assert "BackendError: got a request to stop, on rank 1" in done.stderr


def test_torchrun(tmp_path):
    """The command line on two ranks: rank 0 alone writes and prints."""
    np.save(tmp_path / "calib.npy", images().numpy())
    (tmp_path / "ranked_model.py").write_text("from test_parallel import network as make\n")
    paths = os.pathsep.join([str(tmp_path), os.path.dirname(__file__), *sys.path])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "slr_gpu", "compress", "--model", "ranked_model:make"]
    command += ["--data", "calib.npy", "--keep", "flops=0.4", "--samples", "900", "--out", "out"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to out") == 1
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["model.safetensors", "plan.json", "report.json"]
    found = slr_gpu.load(tmp_path / "out", network)
    wanted = compressed(batch_size=100).model.state_dict()
    for name, value in found.state_dict().items():
        assert float((wanted[name] - value).abs().max()) <= 1e-5


def test_a_group_of_the_program_is_not_taken_unasked(tmp_path):
    def work(group):
        with pytest.raises(slr_gpu.InputError, match="default process group"):
            with slr_gpu.ranks():
                pass
        other = slr_gpu.parallel.Ranks(torch.distributed.new_group())
        return other.sum((np.ones(2),))[0].tolist(), other.broadcast(group.rank)

    assert on_ranks(2, work) == [([2.0, 2.0], 0)] * 2
