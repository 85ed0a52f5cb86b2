// Group soft threshold over columns, fused with forming C (Ma et al. 2018, eq. 10).
//
// In: M, and optionally B and dual, each (batch, n, m) row-major and contiguous; tau (batch);
// groups of `group_size` neighbouring columns. Out: norms (batch, groups), kept (batch) and A:
//
//     C = M - B - dual / t,    norm_g = ||C_g||_F,    A_g = max(0, 1 - tau / norm_g) C_g
//
// A NaN makes its group NaN and counts as kept. Three launches:
//   column_squares  reads the inputs once; sums of squares per column and slab of rows
//   column_norms    adds slabs and columns of a group in a fixed order; counts what is kept
//   column_scale    reads the inputs again (not those of dropped groups) and writes A
// Squares are summed in double. No floating-point atomics: same input, same bits.
//
// A block is THREADS threads: `lanes` (a power of two, <= 32) neighbouring packs of VEC columns
// times THREADS / lanes rows, so that narrow matrices still fill their warps. Blocks are numbered
// ((batch * slabs) + slab) * tiles + tile. VEC > 1 needs m % VEC == 0 and 16-byte aligned rows.

#define THREADS 256
#define FULL_WARP 0xffffffffu

template <typename T, int VEC>
struct alignas(sizeof(T) * VEC) Pack {
    T at[VEC];
};

// Where a thread works: its first column, its rows, and the offset of its batch entry.
struct Place {
    long long batch, slab, column, row, end;
    int step;
};

__device__ Place find_place(long long n, int slabs, long long rows, int tiles, int lanes, int vec)
{
    const long long block = blockIdx.x;
    const long long strip = block / tiles;
    Place at;
    at.batch = strip / slabs;
    at.slab = strip % slabs;
    at.column = ((block % tiles) * lanes + threadIdx.x % lanes) * vec;
    at.row = at.slab * rows + threadIdx.x / lanes;
    at.end = at.slab * rows + rows < n ? at.slab * rows + rows : n;
    at.step = THREADS / lanes;
    return at;
}

// C at VEC neighbouring positions; B and dual may be null.
template <typename T, int VEC>
__device__ Pack<T, VEC> form(const T* __restrict__ M, const T* __restrict__ B,
                             const T* __restrict__ dual, T t, long long i)
{
    Pack<T, VEC> c = *reinterpret_cast<const Pack<T, VEC>*>(M + i);
    if (B) {
        const Pack<T, VEC> b = *reinterpret_cast<const Pack<T, VEC>*>(B + i);
        for (int v = 0; v < VEC; ++v) c.at[v] -= b.at[v];
    }
    if (dual) {
        const Pack<T, VEC> d = *reinterpret_cast<const Pack<T, VEC>*>(dual + i);
        for (int v = 0; v < VEC; ++v) c.at[v] -= d.at[v] / t;
    }
    return c;
}

// partial (batch, slabs, m): squares of C summed over the rows of each slab.
template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS)
column_squares(const T* __restrict__ M, const T* __restrict__ B, const T* __restrict__ dual, T t,
               long long n, long long m, int slabs, long long rows, int tiles, int lanes,
               double* __restrict__ partial)
{
    __shared__ double sums[VEC][THREADS];
    const Place at = find_place(n, slabs, rows, tiles, lanes, VEC);
    double sum[VEC] = {};
    if (at.column < m) {
#pragma unroll 4
        for (long long row = at.row; row < at.end; row += at.step) {
            const Pack<T, VEC> c =
                form<T, VEC>(M, B, dual, t, (at.batch * n + row) * m + at.column);
            for (int v = 0; v < VEC; ++v) sum[v] += double(c.at[v]) * double(c.at[v]);
        }
    }
    for (int v = 0; v < VEC; ++v) sums[v][threadIdx.x] = sum[v];
    // A tree over the rows of the block; neighbouring columns are `lanes` threads apart.
    for (int half = THREADS / 2; half >= lanes; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            for (int v = 0; v < VEC; ++v) sums[v][threadIdx.x] += sums[v][threadIdx.x + half];
        }
    }
    if (threadIdx.x < lanes && at.column < m) {
        double* out = partial + (at.batch * slabs + at.slab) * m + at.column;
        for (int v = 0; v < VEC; ++v) out[v] = sums[v][threadIdx.x];
    }
}

// `lanes` threads a group (a power of two, <= 32), `tiles` blocks a batch entry.
template <typename T>
__global__ void __launch_bounds__(THREADS)
column_norms(const double* __restrict__ partial, const T* __restrict__ tau, long long m,
             int group_size, int slabs, int tiles, int lanes, T* __restrict__ norms,
             unsigned long long* __restrict__ kept)
{
    const long long batch = blockIdx.x / tiles, groups = m / group_size;
    const long long group =
        (long long)(blockIdx.x % tiles) * (THREADS / lanes) + threadIdx.x / lanes;
    const int lane = threadIdx.x % lanes;
    double sum = 0;
    if (group < groups) {
        for (int slab = 0; slab < slabs; ++slab) {
            const double* row = partial + (batch * slabs + slab) * m + group * group_size;
            for (int j = lane; j < group_size; j += lanes) sum += row[j];
        }
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(FULL_WARP, sum, offset);
    }
    bool keep = false;
    if (group < groups && lane == 0) {
        const T norm = T(sqrt(sum));
        norms[batch * groups + group] = norm;
        keep = !(norm <= tau[batch]);  // so that NaN is kept and shows
    }
    // Integers, so the order in which the warps arrive does not matter.
    const unsigned votes = __ballot_sync(FULL_WARP, keep);
    if (threadIdx.x % 32 == 0 && votes) {
        atomicAdd(kept + batch, (unsigned long long)__popc(votes));
    }
}

template <typename T, int VEC>
__global__ void __launch_bounds__(THREADS)
column_scale(const T* __restrict__ M, const T* __restrict__ B, const T* __restrict__ dual, T t,
             const T* __restrict__ norms, const T* __restrict__ tau, long long n, long long m,
             int group_size, int slabs, long long rows, int tiles, int lanes, T* __restrict__ A)
{
    const Place at = find_place(n, slabs, rows, tiles, lanes, VEC);
    if (at.column >= m) return;
    const T* norm = norms + at.batch * (m / group_size);
    T scale[VEC];
    bool silent = true;
    for (int v = 0; v < VEC; ++v) {
        const T r = norm[(at.column + v) / group_size];
        const bool dropped = r <= tau[at.batch];
        scale[v] = dropped ? T(0) : T(1) - tau[at.batch] / r;
        // A dropped group of infinite norm is multiplied out: inf * 0 has to show as NaN.
        silent = silent && dropped && r - r == T(0);
    }
#pragma unroll 4
    for (long long row = at.row; row < at.end; row += at.step) {
        const long long i = (at.batch * n + row) * m + at.column;
        Pack<T, VEC> c = {};
        if (!silent) {
            c = form<T, VEC>(M, B, dual, t, i);
            for (int v = 0; v < VEC; ++v) c.at[v] *= scale[v];
        }
        *reinterpret_cast<Pack<T, VEC>*>(A + i) = c;
    }
}
