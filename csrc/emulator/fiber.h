// Fibers: stacks between which a thread switches. On x86-64 a switch is a few instructions, elsewhere it uses ucontext. If
// LORA_EDGE_ASAN is defined, each switch is announced to the address sanitizer.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(LORA_EDGE_UCONTEXT)
#define LORA_EDGE_SWITCH  // in assembly
#else
#include <ucontext.h>
#endif

namespace lora_edge::emulator {

struct Fiber {
  char* stack = nullptr;  // lowest address; null: the program's own stack
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // the sanitizer's
#if defined(LORA_EDGE_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Makes `fiber` start `body` at the next switch to it. `body` must not return; `index` spreads the stacks over the sets of the
// cache.
void prepare(Fiber& fiber, int index, void (*body)());

// Cleans up the stack of a fiber that was abandoned in the middle of a function.
void forget(Fiber& fiber);

// Switches from `from` to `to`. `last`: `from` will not be resumed.
void switch_to(Fiber& from, Fiber& to, bool last = false);

// A body calls this first: it tells the sanitizer that the switch is complete.
void entered(Fiber& main);

}  // namespace lora_edge::emulator
