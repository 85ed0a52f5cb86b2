"""Inference sessions of stock CPU runtimes and honest latency measurement."""

from .measure import bench
from .result import BenchResult

__all__ = ["BenchResult", "bench"]
