"""Every kernel and instantiation compiles for the supported architectures, without a GPU.

In: kernels/*.cu with each activation. Out: a CUBIN for sm_80, sm_90 and sm_100 from NVRTC, which
needs no driver; skipped where CuPy or NVRTC are not installed (extra ``test-cuda``).
"""

import pytest

from slr_gpu import activations
from slr_gpu.ops.launch import activation_defines, kernel_names, kernel_source

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SOURCES = [
    ("column_shrink", None),
    ("svt", None),
    *(("masked_gradient", name) for name in activations.names()),
]


@pytest.fixture(scope="session")
def nvrtc():
    """CuPy's binding of NVRTC, once it has compiled something."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed: extra test-cuda")
    try:
        cupy.cuda.nvrtc.getVersion()
    # The library is loaded at the first call; each CuPy release reports its absence in its own
    # way (ImportError, OSError, RuntimeError and its subclasses).
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"NVRTC does not load: {error}")
    return cupy.cuda.nvrtc


def cubin(nvrtc, text, names, architecture):
    """Compile a text; fails with the compiler's log."""
    program = nvrtc.createProgram(text, "kernel.cu", [], [])
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, ["--std=c++17", f"--gpu-architecture={architecture}"])
        except nvrtc.NVRTCError:
            pytest.fail(nvrtc.getProgramLog(program))
        lowered = [nvrtc.getLoweredName(program, name) for name in names]
        return nvrtc.getCUBIN(program), lowered
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "activation"), SOURCES)
def test_compiles(nvrtc, name, activation, architecture):
    defines = "" if activation is None else activation_defines(activations.get(activation))
    names = list(
        dict.fromkeys(n for dtype in ("float32", "float64") for n in kernel_names(name, dtype))
    )
    binary, lowered = cubin(nvrtc, kernel_source(name, defines), names, architecture)
    assert binary[:4] == b"\x7fELF"
    for symbol in lowered:
        assert (symbol if isinstance(symbol, bytes) else symbol.encode()) in binary


def test_a_mistake_does_not_compile(nvrtc):
    text = kernel_source("svt").replace("warp_sum(pp)", "warp_sum(pp, 1)")
    with pytest.raises(pytest.fail.Exception, match="warp_sum"):
        cubin(nvrtc, text, kernel_names("svt", "float32"), "sm_90")
