"""The stand-in for CUDA that test_kernels_host.py relies on: what it computes and what it finds.

In: small kernels written here. Checked: indices, warp operations, vector types, atomics, dynamic
shared memory, and a message for every wrong use of a barrier or a mask.
"""

import cuda_host
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(cuda_host.compiler() is None, reason="no C++ compiler (g++)")

TEXT = """
#define ALL 0xffffffffu
__global__ void where(int* out)
{
    out[blockIdx.x * blockDim.x + threadIdx.x] = gridDim.x * 1000 + threadIdx.x;
}
__global__ void warp(const float* in, float* out, unsigned* votes)
{
    const int i = threadIdx.x, n = blockDim.x;
    out[i] = __shfl_sync(ALL, in[i], 3);
    out[n + i] = __shfl_down_sync(ALL, in[i], 5);
    out[2 * n + i] = __shfl_up_sync(ALL, in[i], 5, 8);
    out[3 * n + i] = __shfl_xor_sync(ALL, in[i], 9);
    votes[i] = __ballot_sync(ALL, in[i] > 0.0f);
    if (i % 32 < 16) out[4 * n + i] = __shfl_xor_sync(0xffffu, in[i], 16);
    __syncwarp();
    if (i == 0) out[5 * n] = rsqrt(4.0f) + __popc(votes[0]) + __ldg(in);
}
__global__ void vectors(const float4* in, double2* out)
{
    const float4 x = in[threadIdx.x];
    out[threadIdx.x] = double2{x.x + x.y, x.z + x.w};
}
template <typename T>
__global__ void reverse(T* data, long long* count)
{
    DYNAMIC_SHARED(T, room);
    room[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
    atomicAdd(count, 1LL);
}
__global__ void unset(float* out)
{
    DYNAMIC_SHARED(float, room);
    out[threadIdx.x] = room[threadIdx.x];
}
__global__ void race(int* out)
{
    __shared__ int room[64];
    room[threadIdx.x] = threadIdx.x + blockIdx.x * 64;
    out[blockIdx.x * 64 + threadIdx.x] = room[(threadIdx.x + 1) % 64];
}
__global__ void leaves() { if (threadIdx.x != 7) __syncthreads(); }
__global__ void two_barriers()
{
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
__global__ void absent() { if (threadIdx.x < 31) __syncwarp(); }
__global__ void outside() { __ballot_sync(0x7fffffffu, true); }
"""
NAMES = ("where", "warp", "vectors", "reverse<float>", "reverse<double>", "unset", "race",
         "leaves", "two_barriers", "absent", "outside")  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    unit = cuda_host.Unit("toys", "", TEXT, NAMES)
    library = cuda_host.build([unit], tmp_path_factory.mktemp("toys"))

    def launch(name, blocks, threads, arguments=(), shared=0, seed=0):
        ops = cuda_host.HostOps(library, cuda_host.numbers([unit]), seed)
        ops._launcher("toys")(name, blocks, threads, arguments, shared)

    return launch


def test_indices(toys):
    out = np.zeros((3, 64), np.int32)
    toys("where", 3, 64, (out,))
    np.testing.assert_array_equal(out, np.tile(3000 + np.arange(64), (3, 1)))


def test_warp_operations(toys):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(64).astype(np.float32)
    out, votes = np.zeros((6, 64), np.float32), np.zeros(64, np.uint32)
    toys("warp", 1, 64, (x, out, votes))
    w, lane = x.reshape(2, 32), np.arange(32)
    np.testing.assert_array_equal(out[0].reshape(2, 32), np.repeat(w[:, 3:4], 32, axis=1))
    np.testing.assert_array_equal(out[1].reshape(2, 32), w[:, np.where(lane < 27, lane + 5, lane)])
    up = np.where(lane % 8 >= 5, lane - 5, lane)
    np.testing.assert_array_equal(out[2].reshape(2, 32), w[:, up])
    np.testing.assert_array_equal(out[3].reshape(2, 32), w[:, lane ^ 9])
    bits = ((w > 0) << lane.astype(np.uint64)).sum(axis=1)
    np.testing.assert_array_equal(votes.reshape(2, 32), np.repeat(bits[:, None], 32, axis=1))
    assert np.isnan(out[4].reshape(2, 32)[:, :16]).all(), "read from outside the mask"
    assert out[5, 0] == np.float32(0.5) + int(bits[0]).bit_count() + x[0]


def test_vector_types(toys):
    x = np.arange(32, dtype=np.float32)
    out = np.zeros((8, 2))
    toys("vectors", 1, 8, (x, out))
    np.testing.assert_array_equal(out, x.reshape(8, 2, 2).sum(axis=2))


@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("double", np.float64)])
@pytest.mark.parametrize("seed", [0, 1])
def test_shared_memory_and_atomics(toys, name, dtype, seed):
    x, count = np.arange(100, dtype=dtype), np.zeros(1, np.int64)
    toys(f"reverse<{name}>", 1, 100, (x, count), 100 * x.itemsize, seed)
    np.testing.assert_array_equal(x, np.arange(100)[::-1])
    assert count[0] == 100


def test_shared_memory_starts_as_nan(toys):
    out = np.zeros(32, np.float32)
    toys("unset", 1, 32, (out,), 128)
    assert np.isnan(out).all()


def test_a_race_gives_a_wrong_result(toys):
    out = np.zeros((2, 64), np.int32)
    toys("race", 2, 64, (out,))
    assert (out != (np.arange(64) + 1) % 64 + np.array([[0], [64]])).any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("leaves", "waits at __syncthreads, line .* but thread 7 of block 0 has left"),
        ("two_barriers", "thread 0 .* line .* but thread 32 .* line"),
        ("absent", "mask names lanes that do not come"),
        ("outside", "thread 63 is not in its own mask"),
    ],
)
def test_wrong_use_is_reported(toys, name, message):
    with pytest.raises(RuntimeError, match=message):
        toys(name, 1, 64)
    out = np.zeros((3, 64), np.int32)
    toys("where", 3, 64, (out,))  # what an error left half-way does not matter afterwards
    assert out[2, 63] == 3063


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("missing", (), "no such kernel"),
        ("leaves", (np.int32(1),), "wrong number"),
        ("where", (np.int32(1),), "argument 0 of .*where has 8 bytes, not 4"),
    ],
)
def test_arguments_are_checked(toys, name, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        toys(name, 1, 32, arguments)


def test_a_text_that_does_not_compile_is_an_error(tmp_path):
    unit = cuda_host.Unit("bad", "", "void f() { undeclared_name; }", ())
    with pytest.raises(RuntimeError, match="undeclared_name"):
        cuda_host.build([unit], tmp_path)
