// Fibers: stacks that are switched by hand. x86-64 in a few instructions, other machines through ucontext; each switch is
// announced to the address sanitizer when LORA_EDGE_ASAN is defined.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(LORA_EDGE_UCONTEXT)
#define LORA_EDGE_SWITCH  // by hand
#else
#include <ucontext.h>
#endif

namespace lora_edge::host {

struct Fiber {
  char* stack = nullptr;  // lowest address; null: the thread that the program began with
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // the sanitizer's
#if defined(LORA_EDGE_SWITCH)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Makes `fiber` begin with `body` when it is switched to next. `body` must not return; `index` spreads the stacks over the
// cache's sets.
void prepare(Fiber& fiber, int index, void (*body)());

// Cleans the stack of a fiber that was left for good in the middle of a function.
void forget(Fiber& fiber);

// Leaves `from` and goes on with `to`. A fiber that will not be gone on with says so by `last`.
void switch_to(Fiber& from, Fiber& to, bool last = false);

// The first thing that a body does: tells the sanitizer that the switch has happened.
void entered(Fiber& main);

}  // namespace lora_edge::host
