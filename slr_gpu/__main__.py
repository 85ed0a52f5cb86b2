"""``python -m slr_gpu``, the same as ``slr-gpu``."""

from .cli import app

app()
