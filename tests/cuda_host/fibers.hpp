// The threads of a CUDA block as fibers, one after the other on one CPU thread.
//
// In: a kernel, its arguments and a launch configuration. Out: the effects of the grid, block by
// block, or a message. Each fiber has its own stack and runs until it reaches a barrier or a warp
// operation; the scheduler then takes the next one, in reversed order (seed 0) or an order
// shuffled by the seed. So a thread sees what another one wrote only if a barrier lies between
// them. It is an error when threads wait at different barriers, when one leaves while others
// wait, when the lanes that a mask names do not all arrive, or when a lane is not in its own
// mask; what is taken from a lane outside the mask is all ones (NaN).
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define HOST_ASAN 1
#else
#define HOST_ASAN 0
#endif

// As in CUDA; set before a fiber goes on.
struct uint3 { unsigned x, y, z; };
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace host {

constexpr size_t STACK = 64 * 1024;

// The compiler's own setjmp: a few instructions and no system call. Not instrumented, as the
// sanitizer would take the jump for one that leaves this stack for good.
using Jump = void*[5];
#if defined(__clang__)
#define HOST_JUMPS __attribute__((noinline, no_sanitize("address", "undefined")))
#else  // noipa: nothing may be assumed to have stayed the same over a jump, threadIdx least of all
#define HOST_JUMPS __attribute__((noipa, no_sanitize("address", "undefined")))
#endif

enum class State { ready, barrier, warp, done };
enum class Op { sync, shuffle, ballot };

struct Fiber {
    ucontext_t start;
    Jump here;
    bool begun = false;
    State state = State::done;
    Op op = Op::sync;
    int line = 0;            // of the barrier or warp operation it waits at
    unsigned mask = 0;       // the lanes it waits for
    int source = 0;          // the lane it reads from
    unsigned char value[16]; // what it offers, then what it gets
    char* stack = nullptr;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<unsigned> order;
    unsigned current = 0;
    void* dynamic = nullptr;
    void (*body)(void**) = nullptr;
    void** arguments = nullptr;
    Jump scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_size = 0;
    std::string error;
};
inline Block block;

#if HOST_ASAN
inline void leave(void** keep, const void* stack, size_t size)
{
    __sanitizer_start_switch_fiber(keep, stack, size);
}
inline void arrive(void* keep, const void** stack, size_t* size)
{
    __sanitizer_finish_switch_fiber(keep, stack, size);
}
#else
inline void leave(void**, const void*, size_t) {}
inline void arrive(void*, const void**, size_t*) {}
#endif

// On its own, as a function that saves its place must not be the one that jumps.
[[noreturn]] HOST_JUMPS inline void jump(Jump& to) { __builtin_longjmp(to, 1); }

// From a fiber back to the scheduler, until the scheduler resumes it.
HOST_JUMPS inline void pause(State state)
{
    Fiber& fiber = block.fibers[block.current];
    fiber.state = state;
    void* keep = nullptr;
    leave(&keep, block.scheduler_stack, block.scheduler_size);
    if (!__builtin_setjmp(fiber.here)) jump(block.scheduler);
    arrive(keep, &block.scheduler_stack, &block.scheduler_size);
}

// A fiber lives on from block to block: one turn of this loop is one CUDA thread.
inline void fiber_main()
{
    arrive(nullptr, &block.scheduler_stack, &block.scheduler_size);
    for (;;) {
        block.body(block.arguments);
        block.fibers[block.current].line = 0;  // it waits nowhere any more
        pause(State::done);
    }
}

HOST_JUMPS inline void resume(unsigned index)
{
    Fiber& fiber = block.fibers[index];
    block.current = index;
    threadIdx = {index % blockDim.x, index / blockDim.x % blockDim.y,
                 index / (blockDim.x * blockDim.y)};
    void* keep = nullptr;
    leave(&keep, fiber.stack, STACK);
    if (!__builtin_setjmp(block.scheduler)) {
        if (fiber.begun) jump(fiber.here);
        fiber.begun = true;
        setcontext(&fiber.start);
    }
    arrive(keep, nullptr, nullptr);
}

inline void prepare(Fiber& fiber)
{
    if (!fiber.stack) fiber.stack = static_cast<char*>(malloc(STACK));
#if HOST_ASAN
    __asan_unpoison_memory_region(fiber.stack, STACK);
#endif
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack;
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, fiber_main, 0);
    fiber.begun = false;
    fiber.line = 0;
    fiber.state = State::done;
}

inline std::string where(unsigned thread)
{
    const Fiber& f = block.fibers[thread];
    const char* what = f.state == State::done ? "has left" : f.state == State::barrier
        ? "waits at __syncthreads" : "waits at a warp operation";
    return "thread " + std::to_string(thread) + " of block " + std::to_string(blockIdx.x) + " " +
        what + (f.state == State::done ? "" : ", line " + std::to_string(f.line));
}

// Complete the warp operations all of whose lanes have arrived. Returns whether there were any.
inline bool release_warps()
{
    bool any = false;
    auto& fibers = block.fibers;
    for (unsigned base = 0; base < fibers.size(); base += 32) {
        const unsigned lanes = std::min<size_t>(32, fibers.size() - base);
        for (unsigned lane = 0; lane < lanes; ++lane) {
            const Fiber& lead = fibers[base + lane];
            if (lead.state != State::warp) continue;
            const unsigned mask = lead.mask;
            bool complete = true;
            for (unsigned l = 0; l < 32 && complete; ++l) {
                if (!(mask >> l & 1)) continue;
                complete = l < lanes;
                if (!complete) break;
                const Fiber& f = fibers[base + l];
                complete = f.state == State::warp && f.line == lead.line && f.mask == mask &&
                    f.op == lead.op;
            }
            if (!complete) continue;
            unsigned votes = 0;
            unsigned char offered[32][16];
            for (unsigned l = 0; l < lanes; ++l) {
                memcpy(offered[l], fibers[base + l].value, 16);
                if (mask >> l & 1 && offered[l][0]) votes |= 1u << l;
            }
            const Op op = lead.op;
            for (unsigned l = 0; l < lanes; ++l) {
                Fiber& f = fibers[base + l];
                if (!(mask >> l & 1)) continue;
                if (op == Op::ballot) memcpy(f.value, &votes, sizeof votes);
                if (op == Op::shuffle) {
                    if (mask >> f.source & 1) memcpy(f.value, offered[f.source], 16);
                    else memset(f.value, 0xff, 16);
                }
                f.state = State::ready;
            }
            any = true;
        }
    }
    return any;
}

// Run the threads of one block to their end; leaves a message in block.error otherwise.
inline void run_block()
{
    auto& fibers = block.fibers;
    for (auto& fiber : fibers) fiber.state = State::ready;
    for (;;) {
        for (unsigned index : block.order) {
            if (fibers[index].state == State::ready) resume(index);
            if (!block.error.empty()) return;
        }
        if (release_warps()) continue;
        const Fiber& lead = fibers[0];
        for (unsigned i = 0; i < fibers.size(); ++i) {
            if (fibers[i].state == State::warp) {
                block.error = where(i) + ", whose mask names lanes that do not come";
                return;
            }
            if (fibers[i].state != lead.state || fibers[i].line != lead.line) {
                block.error = where(0) + ", but " + where(i);
                return;
            }
        }
        if (lead.state == State::done) return;
        for (auto& fiber : fibers) fiber.state = State::ready;
    }
}

inline const char* launch(void (*body)(void**), void** arguments, unsigned blocks,
                          unsigned threads, size_t shared, unsigned seed)
{
    const bool dirty = !block.error.empty();  // fibers that an error left half-way
    const size_t before = block.fibers.size();
    if (block.fibers.capacity() < 1024) block.fibers.reserve(1024);
    if (threads > 1024) return "more than 1024 threads a block";
    if (threads < before) {
        for (size_t i = threads; i < before; ++i) free(block.fibers[i].stack);
    }
    block.fibers.resize(threads);
    for (size_t i = dirty ? 0 : before; i < threads; ++i) prepare(block.fibers[i]);
    block.error.clear();
    block.body = body;
    block.arguments = arguments;
    blockDim = {threads, 1, 1};
    gridDim = {blocks, 1, 1};
    block.order.resize(threads);
    for (unsigned i = 0; i < threads; ++i) block.order[i] = threads - 1 - i;
    for (unsigned i = threads - 1, x = seed; seed && i > 0; --i) {
        x = x * 1664525u + 1013904223u;
        std::swap(block.order[i], block.order[(x >> 8) % (i + 1)]);
    }
    block.dynamic = aligned_alloc(16, (shared + 15) / 16 * 16);
#if HOST_ASAN
    __asan_poison_memory_region(static_cast<char*>(block.dynamic) + shared, (16 - shared % 16) % 16);
#endif
    for (unsigned b = 0; b < blocks && block.error.empty(); ++b) {
        blockIdx = {b, 0, 0};
        memset(block.dynamic, 0xff, shared);
        run_block();
    }
#if HOST_ASAN
    __asan_unpoison_memory_region(block.dynamic, (shared + 15) / 16 * 16);
#endif
    free(block.dynamic);
    return block.error.empty() ? nullptr : block.error.c_str();
}

}  // namespace host
