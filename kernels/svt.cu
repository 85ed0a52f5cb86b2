// Batched singular value thresholding by one-sided Jacobi (Ma et al. 2018, eq. 12; the rotations
// are Hestenes 1958, as in Demmel and Veselic 1992).
//
// In: M (batch, n, m), row-major and contiguous; tau (batch). Out: sigma (batch, k), descending,
// rank (batch) = singular values above tau, and, for M = U diag(sigma) V^T with k = min(n, m),
//
//     X = U diag(max(sigma - tau, 0)) V^T
//
// One block a matrix. The k rows (columns, if there are fewer of them) of M, scaled by a power of
// two so that no square over- or underflows, live in shared memory as vectors w_j of `length`
// numbers. Each warp makes a pair of them orthogonal by a plane rotation; a round of a tournament
// holds disjoint pairs, and k - 1 rounds meet every pair once. When no pair needed a rotation,
// the w_j are sigma_j times the singular vectors of the long side, without having squared the
// condition number, and with b_i the rows (columns) of M
//
//     x_i = sum_j (b_i . w_j) (1 - tau / sigma_j) / sigma_j^2 w_j    over sigma_j > tau,
//
// so the rotations themselves are never stored. With tau = 0, X = M. A matrix with a NaN or an
// infinity gives NaN everywhere and rank 0, as no threshold of it exists.
//
// Dynamic shared memory: (k * (length | 1) + 2 k + warps * k) numbers of type T. The odd row
// stride keeps threads that walk down the vectors in different banks.

#define MAX_THREADS 1024
#define FULL_WARP 0xffffffffu

#ifndef DYNAMIC_SHARED  // the host tests bring their own
#define DYNAMIC_SHARED(T, name)                                  \
    extern __shared__ __align__(16) unsigned char name##_raw[];  \
    T* name = reinterpret_cast<T*>(name##_raw)
#endif

template <typename T> struct Real;
template <> struct Real<float> {
    static constexpr float epsilon = 1.1920929e-7f, largest = 3.4028235e38f;
    static constexpr float smallest = 1e-31f;  // squared norm with digits: least normal / epsilon
    static constexpr int exponents = 126;
};
template <> struct Real<double> {
    static constexpr double epsilon = 2.220446049250313e-16, largest = 1.7976931348623157e308;
    static constexpr double smallest = 1e-292;
    static constexpr int exponents = 1022;
};

// Every thread of the warp gets the same bits.
template <typename T>
__device__ T warp_sum(T value)
{
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(FULL_WARP, value, offset);
    }
    return value;
}

template <typename T>
__device__ T larger_or_nan(T a, T b)
{
    return (a > b || a != a) ? a : b;
}

// The largest absolute value of the matrix, NaN if it holds one, to every thread.
template <typename T>
__device__ T block_peak(const T* __restrict__ matrix, long long size, T* scratch)
{
    T peak = T(0);
    for (long long i = threadIdx.x; i < size; i += blockDim.x) {
        peak = larger_or_nan(T(fabs(matrix[i])), peak);
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        peak = larger_or_nan(T(__shfl_xor_sync(FULL_WARP, peak, offset)), peak);
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = peak;
    __syncthreads();
    for (int warp = 0; warp < blockDim.x / 32; ++warp) peak = larger_or_nan(scratch[warp], peak);
    return peak;
}

// Make p and q orthogonal, by one warp. Returns whether they were not already; vectors whose
// squared norm is under `negligible` count as orthogonal to all.
template <typename T>
__device__ bool rotate(T* p, T* q, int length, T tolerance, T negligible)
{
    const int lane = threadIdx.x % 32;
    T pp = T(0), qq = T(0), pq = T(0);
    for (int i = lane; i < length; i += 32) {
        pp += p[i] * p[i];
        qq += q[i] * q[i];
        pq += p[i] * q[i];
    }
    pp = warp_sum(pp);
    qq = warp_sum(qq);
    pq = warp_sum(pq);
    if (pp < negligible || qq < negligible) return false;
    if (fabs(pq) <= tolerance * sqrt(pp) * sqrt(qq)) return false;
    // The smaller root of u^2 + 2 zeta u - 1 = 0, u the tangent of the angle.
    const T zeta = (qq - pp) / (T(2) * pq);
    const T size = T(fabs(zeta));
    const T root = size > T(1e8) ? size : T(sqrt(T(1) + size * size));  // no overflow
    const T tangent = (zeta < T(0) ? T(-1) : T(1)) / (size + root);
    const T cosine = T(1) / T(sqrt(T(1) + tangent * tangent)), sine = cosine * tangent;
    const T half = sine / (T(1) + cosine);  // of the angle, its tangent
    for (int i = lane; i < length; i += 32) {
        const T x = p[i], y = q[i];
        p[i] = x - sine * (y + half * x);  // rounds a small correction, not the cosine
        q[i] = y + sine * (x - half * y);
    }
    return true;
}

template <typename T>
__global__ void __launch_bounds__(MAX_THREADS)
svt_jacobi(const T* __restrict__ M, const T* __restrict__ tau, int n, int m, int sweeps,
           T* __restrict__ X, T* __restrict__ sigma, long long* __restrict__ rank)
{
    DYNAMIC_SHARED(T, w);
    __shared__ T scratch[MAX_THREADS / 32];
    __shared__ int rotated, above;
    const int k = n < m ? n : m, length = n < m ? m : n, stride = length | 1;
    T* norm = w + k * stride;
    T* gain = norm + k;
    T* mix = gain + k;  // k numbers a warp
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const long long batch = blockIdx.x, size = (long long)n * m;
    const T threshold = tau[batch];
    // Element l of vector i is at i * hop + l * skip.
    const int hop = n > m ? 1 : m, skip = n > m ? m : 1;
    M += batch * size;
    X += batch * size;
    sigma += batch * k;

    const T peak = block_peak(M, size, scratch);
    if (!(peak <= Real<T>::largest)) {
        for (long long i = threadIdx.x; i < size; i += blockDim.x) X[i] = peak - peak;
        for (int j = threadIdx.x; j < k; j += blockDim.x) sigma[j] = peak - peak;
        if (threadIdx.x == 0) rank[batch] = 0;
        return;
    }
    int exponent = peak > T(0) ? -ilogb(peak) : 0;
    exponent = min(max(exponent, -Real<T>::exponents), Real<T>::exponents);
    const T up = T(ldexp(T(1), exponent)), down = T(ldexp(T(1), -exponent));
    for (long long i = threadIdx.x; i < size; i += blockDim.x) {
        const int row = int(i / m), column = int(i % m);
        w[n > m ? column * stride + row : row * stride + column] = M[i] * up;
    }
    if (threadIdx.x == 0) above = 0;

    // Well above the rounding of a dot product, else noise would be rotated for ever.
    const T tolerance = Real<T>::epsilon * max(T(4), T(0.25) * T(sqrt(T(length))));
    // Rounding errors that the threshold drops need no sweeps either; sigma_1 is at least 1 here.
    const T noise = min(Real<T>::epsilon, threshold * up);
    const T negligible = max(Real<T>::smallest, noise * noise);
    // A tournament: the last player stays, the others move on one chair a round. With an odd
    // number, the player paired with the missing one rests.
    const int players = k + (k & 1), rounds = players - 1;
    for (int sweep = 0; sweep < sweeps; ++sweep) {
        if (threadIdx.x == 0) rotated = 0;
        __syncthreads();
        for (int round = 0; round < rounds; ++round) {
            for (int pair = warp; pair < players / 2; pair += warps) {
                const int p = pair == 0 ? rounds : (round + pair) % rounds;
                const int q = (round + rounds - pair) % rounds;
                if (p < k && rotate(w + p * stride, w + q * stride, length, tolerance,
                                    negligible)) {
                    if (lane == 0) rotated = 1;  // any warp may write: always the same value
                }
            }
            __syncthreads();
        }
        const bool again = rotated != 0;
        __syncthreads();  // all have read it before it is cleared
        if (!again) break;
    }

    for (int j = warp; j < k; j += warps) {
        T sum = T(0);
        for (int l = lane; l < length; l += 32) sum += w[j * stride + l] * w[j * stride + l];
        sum = warp_sum(sum);
        if (lane == 0) norm[j] = T(sqrt(sum));
    }
    __syncthreads();
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
        const T value = norm[j] * down;
        int position = 0;
        for (int i = 0; i < k; ++i) position += norm[i] > norm[j] || (norm[i] == norm[j] && i < j);
        sigma[position] = value;
        gain[j] = value <= threshold ? T(0) : (T(1) - threshold / value) / norm[j] / norm[j];
        if (value > threshold) atomicAdd(&above, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) rank[batch] = above;
    if (threshold == T(0)) {
        for (long long i = threadIdx.x; i < size; i += blockDim.x) X[i] = M[i];
        return;
    }
    mix += warp * k;
    for (int i = warp; i < k; i += warps) {
        for (int j = lane; j < k; j += 32) {
            T dot = T(0);
            if (gain[j] != T(0)) {
                for (int l = 0; l < length; ++l) {
                    dot += M[i * hop + l * skip] * up * w[j * stride + l];
                }
            }
            mix[j] = dot * gain[j];
        }
        __syncwarp();
        for (int l = lane; l < length; l += 32) {
            T sum = T(0);
            for (int j = 0; j < k; ++j) sum += mix[j] * w[j * stride + l];
            X[i * hop + l * skip] = sum * down;
        }
        __syncwarp();
    }
}
