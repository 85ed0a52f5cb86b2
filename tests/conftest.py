"""Test processes side by side (pytest-xdist) have one thread each: threads that wait for a core which
another process has are slower than one."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before numpy and torch look
    os.environ.setdefault("OMP_NUM_THREADS", "1")
