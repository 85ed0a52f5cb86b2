// Enough of CUDA C++ to compile kernels/*.cu, unchanged, with a C++17 compiler and to run them.
//
// In: the text of a kernel, after this header. Out: host_launch, with arguments as cuLaunchKernel
// takes them; fibers.hpp runs the threads and finds missing barriers and wrong masks. Shared
// variables are static locals, as blocks run one after the other. Dynamic shared memory has
// exactly the size asked for and starts as all ones (NaN), so that sanitizers and comparisons see
// misuse; a kernel takes it with DYNAMIC_SHARED(type, name), as `extern` cannot be redefined.
#pragma once

#include <math.h>

#include "fibers.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(host::block.dynamic)

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };

namespace host {

inline void warp_op(Op op, unsigned mask, int line, int source)
{
    Fiber& fiber = block.fibers[block.current];
    if (!(mask >> block.current % 32 & 1)) {
        block.error = "thread " + std::to_string(block.current) + " is not in its own mask, line " +
            std::to_string(line);
    }
    fiber.op = op;
    fiber.mask = mask;
    fiber.line = line;
    fiber.source = source;
    pause(State::warp);
}

inline void barrier(int line)
{
    block.fibers[block.current].line = line;
    pause(State::barrier);
}

template <typename T>
T shuffle(int line, unsigned mask, T value, int source, bool inside)
{
    static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes here");
    Fiber& fiber = block.fibers[block.current];
    memcpy(fiber.value, &value, sizeof value);
    warp_op(Op::shuffle, mask, line, inside ? source : int(block.current % 32));
    memcpy(&value, fiber.value, sizeof value);
    return value;
}

inline int lane() { return block.current % 32; }
template <typename T>
T shuffle_at(int line, unsigned mask, T value, int source, int width = 32)
{
    return shuffle(line, mask, value, lane() / width * width + (source & (width - 1)), true);
}
template <typename T>
T shuffle_down(int line, unsigned mask, T value, unsigned delta, int width = 32)
{
    return shuffle(line, mask, value, lane() + delta, lane() % width + int(delta) < width);
}
template <typename T>
T shuffle_up(int line, unsigned mask, T value, unsigned delta, int width = 32)
{
    return shuffle(line, mask, value, lane() - int(delta), lane() % width >= int(delta));
}
template <typename T>
T shuffle_xor(int line, unsigned mask, T value, int flip, int width = 32)
{
    return shuffle(line, mask, value, lane() ^ flip, (lane() ^ flip) < (lane() / width + 1) * width);
}

inline unsigned ballot(int line, unsigned mask, bool vote)
{
    Fiber& fiber = block.fibers[block.current];
    fiber.value[0] = vote;
    warp_op(Op::ballot, mask, line, 0);
    unsigned votes;
    memcpy(&votes, fiber.value, sizeof votes);
    return votes;
}

// Call a kernel with arguments as cuLaunchKernel gets them: an address and a size each.
template <auto kernel>
struct Call;
template <typename... P, void (*kernel)(P...)>
struct Call<kernel> {
    static constexpr int count = sizeof...(P);
    static constexpr size_t sizes[] = {sizeof(P)...};
    template <size_t... I>
    static void unpack(void** arguments, std::index_sequence<I...>)
    {
        kernel(*static_cast<P*>(arguments[I])...);
    }
    static void run(void** arguments) { unpack(arguments, std::index_sequence_for<P...>()); }
};

struct Kernel {
    const char* name;
    void (*body)(void**);
    int count;
    const size_t* sizes;
};
extern const std::vector<Kernel> kernels;
template <auto kernel>
Kernel entry(const char* name)
{
    return {name, &Call<kernel>::run, Call<kernel>::count, Call<kernel>::sizes};
}

}  // namespace host

#define __syncthreads() host::barrier(__LINE__)
#define __syncwarp(...) host::warp_op(host::Op::sync, 0xffffffffu, __LINE__, 0)
#define __shfl_sync(...) host::shuffle_at(__LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) host::shuffle_down(__LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) host::shuffle_up(__LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) host::shuffle_xor(__LINE__, __VA_ARGS__)
#define __ballot_sync(mask, vote) host::ballot(__LINE__, mask, vote)

using std::max;
using std::min;

template <typename T>
T atomicAdd(T* address, T value)
{
    const T old = *address;
    *address += value;
    return old;
}
template <typename T>
T __ldg(const T* address)
{
    return *address;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// Returns null, or what went wrong; the text lives until the next launch.
extern "C" __attribute__((used)) inline const char* host_launch(const char* name, unsigned blocks, unsigned threads,
                                          size_t shared, void** arguments, const size_t* sizes,
                                          int count, unsigned seed)
{
    static std::string message;
    for (const auto& kernel : host::kernels) {
        if (strcmp(kernel.name, name) != 0) continue;
        if (count != kernel.count) return "wrong number of kernel arguments";
        for (int i = 0; i < count; ++i) {
            if (sizes[i] != kernel.sizes[i]) {
                message = "argument " + std::to_string(i) + " of " + name + " has " +
                    std::to_string(kernel.sizes[i]) + " bytes, not " + std::to_string(sizes[i]);
                return message.c_str();
            }
        }
        return host::launch(kernel.body, arguments, blocks, threads, shared, seed);
    }
    return "no such kernel was built";
}
