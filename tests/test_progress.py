"""Progress on a terminal, in a file, and handed on to another process."""

from __future__ import annotations

import pytest

from slr_gpu import progress
from slr_gpu.progress import JobBars, progress_bar, reported_to


def test_progress_is_handed_on():
    heard = []
    with reported_to(lambda *step: heard.append(step)), progress_bar("a", 1000) as advance:
        for _ in range(1000):
            advance()
        advance(0, description="b")
    assert heard[0] == ("a", 0, 1000) and heard[-2:] == [("a", 1000, 1000), ("b", 1000, 1000)]
    assert len(heard) < 100


def test_on_a_pipe_there_is_a_line_a_job(capsys):
    with JobBars(2) as bars:
        bars.update("worker", "job [red]: fitting", 1, 3)
        bars.finish("job [red]: done")
        bars.remove("worker")
    assert capsys.readouterr() == ("", "job [red]: done\n")


@pytest.mark.parametrize("show", [True, False])
def test_on_a_pipe_long_work_says_how_far_it_is(capsys, monkeypatch, show):
    with progress_bar("short [work]", 4, show=show) as advance:
        advance(2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "LINE_S", 0.0)
    with progress_bar("long [work]", 4, show=show) as advance:
        for _ in range(4):
            advance()
    out, lines = capsys.readouterr()
    assert out == ""
    lines = lines.splitlines()
    assert len(lines) == (4 if show else 0)
    if show:
        assert lines[0].startswith("long [work]: 25%, 0:00:00 elapsed")
        assert lines[-1].startswith("long [work]: 100%")
