// CUDA's language on the CPU, as far as our kernels use it: for tests on machines without a GPU.
//
// Blocks run one after the other. The threads of a block are fibers of one thread of the processor: each runs until it waits
// for its block (`__syncthreads`) or its warp (a shuffle), in ascending or, to find what misses a barrier, in descending
// order. Waiting for a thread that has ended, or for one that waits for the warp while this one waits for the block, is an error
// here; on a GPU it is undefined. Which of several barriers of one kind a thread waits at is not looked at.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
// Static, so that no section below belongs to a function that the linker may share.
#define __device__ static
#define __forceinline__ inline
// All of it lies in one section, and is full of NaN when a block begins: on a GPU too it holds anything then.
#define __shared__ static __attribute__((section("shared_memory")))

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

Index3 threadIdx, blockIdx, blockDim, gridDim;

extern "C" char __start_shared_memory[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_shared_memory[] __attribute__((weak, visibility("hidden")));

namespace emulation {

constexpr unsigned WARP = 32;
// A fiber's stack: kernels keep a few small arrays.
constexpr size_t STACK = 64 * 1024;

enum class State { Ready, AtBlock, AtWarp, Ended };

struct Thread {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  State state = State::Ready;
};

struct Block {
  std::vector<Thread> threads;
  // What a warp's threads show each other.
  std::vector<uint32_t> slots;
  ucontext_t scheduler;
  unsigned current = 0;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};

inline Block* running = nullptr;
// Kernels keep shared memory in static variables, and the emulation what it runs.
inline std::mutex one_at_a_time;

inline void wait(State state) {
  Thread& thread = running->threads[running->current];
  thread.state = state;
  swapcontext(&thread.context, &running->scheduler);
}

inline void fiber() {
  running->body(running->arguments);
  wait(State::Ended);
}

// Moves threads [from, to) on if all of them wait in `state`.
inline bool release(Block& block, unsigned from, unsigned to, State state) {
  for (unsigned i = from; i < to; i++)
    if (block.threads[i].state != state) return false;
  for (unsigned i = from; i < to; i++) block.threads[i].state = State::Ready;
  return true;
}

// Runs a block to its end; an error's text otherwise.
inline const char* run(Block& block, bool descending) {
  running = &block;
  std::memset(__start_shared_memory, 0xff, __stop_shared_memory - __start_shared_memory);
  const unsigned count = block.threads.size();
  for (Thread& thread : block.threads) {
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = STACK;
    thread.context.uc_link = nullptr;
    thread.state = State::Ready;
    makecontext(&thread.context, fiber, 0);
  }
  for (;;) {
    for (unsigned i = 0; i < count; i++) {
      block.current = descending ? count - 1 - i : i;
      Thread& thread = block.threads[block.current];
      if (thread.state != State::Ready) continue;
      threadIdx.x = block.current;
      swapcontext(&block.scheduler, &thread.context);
    }
    bool ended = true;
    for (const Thread& thread : block.threads) ended &= thread.state == State::Ended;
    if (ended) return nullptr;
    bool moved = release(block, 0, count, State::AtBlock);
    for (unsigned warp = 0; warp < count; warp += WARP) moved |= release(block, warp, warp + WARP, State::AtWarp);
    if (!moved) return "threads wait for others that have ended or wait elsewhere";
  }
}

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[I])...);
}

// Runs `kernel` on `blocks` blocks of `threads` threads; `arguments` point at its arguments, as in cuLaunchKernel. Null, or an error's text.
template <class... Parameters>
const char* launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, bool descending, void** arguments) {
  std::lock_guard<std::mutex> guard(one_at_a_time);
  if (threads == 0 || threads % WARP != 0 || threads > 1024) return "a block has whole warps, at most 1024 threads";
  if (blocks == 0) return "a grid without blocks";
  struct Body {
    void (*kernel)(Parameters...);
    void** arguments;
  } body{kernel, arguments};
  Block block;
  block.threads.resize(threads);
  block.slots.resize(threads);
  block.arguments = &body;
  block.body = [](void* pointer) {
    auto* body = static_cast<Body*>(pointer);
    call(body->kernel, body->arguments, std::index_sequence_for<Parameters...>());
  };
  blockDim.x = threads;
  gridDim.x = blocks;
  for (unsigned i = 0; i < blocks; i++) {
    blockIdx.x = descending ? blocks - 1 - i : i;
    if (const char* error = run(block, descending)) return error;
  }
  return nullptr;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::State::AtBlock); }

// The value of the thread whose lane differs by `mask`.
inline float __shfl_xor_sync(unsigned, float value, int mask) {
  emulation::Block& block = *emulation::running;
  const unsigned self = block.current;
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  block.slots[self] = bits;
  emulation::wait(emulation::State::AtWarp);
  bits = block.slots[self ^ mask];
  emulation::wait(emulation::State::AtWarp);
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

template <class... Parameters>
unsigned size_of_parameter(void (*)(Parameters...), unsigned index) {
  constexpr unsigned sizes[] = {sizeof(Parameters)...};
  return index < sizeof...(Parameters) ? sizes[index] : 0;
}

// The kernel's entrance for tests, and the sizes of its parameters: 0 behind the last.
#define EMULATED(kernel)                                                                                            \
  extern "C" const char* emulate_##kernel(unsigned blocks, unsigned threads, bool descending, void** arguments) {     \
    return emulation::launch(kernel, blocks, threads, descending, arguments);                                         \
  }                                                                                                                  \
  extern "C" unsigned size_in_##kernel(unsigned index) { return size_of_parameter(kernel, index); }
