"""What can go wrong, as classes.

Every error that a user can cause derives from `SLRError` and says three things: what was
got, what was expected, and what to do about it. Numerical outcomes (not converged, budget
only partly used) are not errors: they are values of `slr_gpu.Status`.
"""

import os
import traceback


class SLRError(Exception):
    """Base class of the errors that this package raises on purpose."""


class InputError(SLRError, ValueError):
    """An argument, array, file or model that cannot be worked with."""


class BudgetError(InputError):
    """A budget that no decomposition can meet; the message names the smallest that can be."""


class BackendError(SLRError, RuntimeError):
    """A device or runtime was asked for that is not installed or does not work."""


class ModelError(SLRError, RuntimeError):
    """The user's model failed while it was run on the calibration data."""


def described(error: Exception) -> str:
    """An error of code that is not this package's, and the line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
    return f"{type(error).__name__}: {error} ({place})"


def complain(got: object, expected: str, remedy: str) -> str:
    """Compose a message in the one form that all errors of this package have."""
    return f"got {got}; expected {expected}. {remedy}"
