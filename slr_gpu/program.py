"""The files that this program is made of, and the version that they are.

Out: a short text that differs wherever another program may compute something else, a checkout
between two releases included.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# In an installed package and in a checkout.
KERNEL_FOLDERS = (PACKAGE / "kernels", PACKAGE.parent / "kernels")


def kernel_files() -> list[Path]:
    """All kernel files, of the first folder that has any."""
    found = (sorted(folder.glob("*.cu")) for folder in KERNEL_FOLDERS)
    return next(filter(None, found), [])


def release() -> str:
    """The version that is installed; a checkout need not be."""
    try:
        return importlib.metadata.version("slr_gpu")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def program_version(package: Path = PACKAGE) -> str:
    """The release, and the start of the SHA-256 of all sources."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode())
        digest.update(path.read_bytes())
    for path in kernel_files():
        digest.update(path.read_bytes())
    return f"{release()}, sources {digest.hexdigest()[:12]}"
