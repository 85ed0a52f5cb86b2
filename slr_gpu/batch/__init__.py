"""Many models, budgets and settings on the devices of one machine."""

from .job import Batch, Job
from .jobs import read_jobs
from .run import run_batch
from .summary import Outcome, Summary

__all__ = ["Batch", "Job", "Outcome", "Summary", "read_jobs", "run_batch"]
