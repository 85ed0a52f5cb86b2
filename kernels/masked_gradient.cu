// Masked residual and its loss in one pass (DESIGN 3.3; Ma et al. 2018, eq. 8).
//
// In: Z, Y (batch, P, n), row-major and contiguous; bias (batch, n) or null. Out: R (batch, P, n)
// and loss (batch), with z = Z + bias, value v and slope s of the activation:
//
//     R = s (Y - v) = -1/2 d loss / d z,    loss = sum (Y - v)^2
//
// ACT_VALUE and ACT_SLOPE are expressions in `z` of type T, ACT_LINEAR one in `z` and `y`; they
// are defined in front of this text from slr_gpu/activations.py (the defaults are ReLU). With
// CONVEX, v = z and s = 1 wherever ACT_LINEAR holds: the convex surrogate l_c.
//
// Each batch entry is read as one long array cut into virtual rows of `width` elements, a multiple
// of n (and of VEC): a thread stays in its columns, so that it reads its bias once, whatever n.
// Blocks are numbered ((batch * slabs) + slab) * tiles + tile. Each block writes its loss, in
// double, to `partial`; loss_sum adds those in a fixed order: same input, same bits.
// VEC > 1 needs P * n % VEC == 0 and 16-byte aligned arrays.

#define THREADS 256

#ifndef ACT_VALUE
#define ACT_VALUE (z > T(0) ? z : (z <= T(0) ? T(0) : z))
#define ACT_SLOPE (z > T(0) ? T(1) : T(0))
#define ACT_LINEAR (z > T(0) || y > T(0))
#endif

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
    T at[VEC];
};

// The sum over the block of one number a thread, in thread 0, by a tree of fixed shape.
__device__ double block_sum(double value)
{
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = value;
    for (int half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    return sums[0];
}

template <typename T, bool CONVEX>
__device__ void respond(T z, T y, T& residual, double& loss)
{
    T value = ACT_VALUE, slope = ACT_SLOPE;
    if (CONVEX && (ACT_LINEAR)) {
        value = z;
        slope = T(1);
    }
    const T error = y - value;
    residual = slope * error;
    loss += double(error) * double(error);
}

template <typename T, int VEC, bool CONVEX>
__global__ void __launch_bounds__(THREADS)
masked_gradient(const T* __restrict__ Z, const T* __restrict__ Y, const T* __restrict__ bias,
                long long size, long long n, long long width, int slabs, long long rows,
                int tiles, T* __restrict__ R, double* __restrict__ partial)
{
    const long long strip = blockIdx.x / tiles, batch = strip / slabs;
    const long long column =
        ((long long)(blockIdx.x % tiles) * THREADS + threadIdx.x) * VEC;
    double loss = 0;
    if (column < width) {
        Pack<T, VEC> shift = {};
        if (bias) {
            for (int v = 0; v < VEC; ++v) shift.at[v] = bias[batch * n + (column + v) % n];
        }
        const long long first = strip % slabs * rows * width + column;
        const long long end = first + rows * width < size ? first + rows * width : size;
#pragma unroll 4
        for (long long i = first; i < end; i += width) {
            const Pack<T, VEC> z = *reinterpret_cast<const Pack<T, VEC>*>(Z + batch * size + i);
            const Pack<T, VEC> y = *reinterpret_cast<const Pack<T, VEC>*>(Y + batch * size + i);
            Pack<T, VEC> r;
            for (int v = 0; v < VEC; ++v) {
                respond<T, CONVEX>(z.at[v] + shift.at[v], y.at[v], r.at[v], loss);
            }
            *reinterpret_cast<Pack<T, VEC>*>(R + batch * size + i) = r;
        }
    }
    loss = block_sum(loss);
    if (threadIdx.x == 0) partial[blockIdx.x] = loss;
}

// loss (batch) from partial (batch, count); one block a batch entry.
__global__ void __launch_bounds__(THREADS)
loss_sum(const double* __restrict__ partial, int count, double* __restrict__ loss)
{
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        sum += partial[(long long)blockIdx.x * count + i];
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[blockIdx.x] = sum;
}
