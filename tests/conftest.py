"""Test processes side by side (pytest-xdist) share the cores: threads that wait for a core which
another process has are slower than one thread."""

import os

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # before numpy and torch look
    own = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, own)))
