"""Runs the kernel cases on a library built with sanitizers; started with their runtime preloaded.

``python sanitized.py LIBRARY NUMBERS PREFIXES``: NUMBERS is a JSON list of [name, defines, index]
and PREFIXES, between commas, select cases by name. NumPy's arrays come from the sanitizer's
malloc, so that an access outside them ends the process with a report.
"""

import json
import sys
import types
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
# The package without its __init__, which would load torch into this process.
package = types.ModuleType("slr_gpu")
package.__path__ = [str(TESTS.parent / "slr_gpu")]
sys.modules["slr_gpu"] = package

import kernel_cases

import cuda_host

library, numbers, prefixes = sys.argv[1:]
ops = cuda_host.HostOps(Path(library), {(n, d): i for n, d, i in json.loads(numbers)})
count = 0
for case in kernel_cases.CASES:
    if case.name.startswith(tuple(prefixes.split(","))):
        case.run(ops)
        count += 1
print(f"{count} cases")
