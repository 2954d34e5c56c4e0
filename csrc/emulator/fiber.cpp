#include "fiber.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#if defined(LORA_EDGE_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lora_edge::emulator {
namespace {

#if defined(LORA_EDGE_ASAN)
constexpr size_t kStackBytes = 512 * 1024;
#else
constexpr size_t kStackBytes = 128 * 1024;
#endif
constexpr size_t kGuardBytes = 64 * 1024;  // at least a whole page on any system

void allocate(Fiber& fiber) {
  char* memory = static_cast<char*>(mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    std::perror("emulator: no memory for a fiber's stack");
    std::abort();
  }
  fiber.stack = memory + kGuardBytes;
  fiber.stack_bytes = kStackBytes;
}

}  // namespace

#if defined(LORA_EDGE_SWITCH)

// A fiber that calls a function has all its state in the callee-saved registers.
extern "C" void lora_edge_switch(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.globl lora_edge_switch
.hidden lora_edge_switch
.type lora_edge_switch, @function
lora_edge_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lora_edge_switch, .-lora_edge_switch
)");

#endif

void prepare(Fiber& fiber, int index, void (*body)()) {
  if (fiber.stack == nullptr) allocate(fiber);
  const size_t used = fiber.stack_bytes - static_cast<size_t>(index % 64) * 576;
#if defined(LORA_EDGE_SWITCH)
  void** top = reinterpret_cast<void**>(fiber.stack + used - 64);
  *--top = nullptr;                        // in place of a return address; aligns the stack for `body`
  *--top = reinterpret_cast<void*>(body);  // the switch returns to it
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = used;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, body, 0);
#endif
}

void forget([[maybe_unused]] Fiber& fiber) {
#if defined(LORA_EDGE_ASAN)
  if (fiber.stack != nullptr) __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#endif
}

void switch_to(Fiber& from, Fiber& to, [[maybe_unused]] bool last) {
#if defined(LORA_EDGE_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#if defined(LORA_EDGE_SWITCH)
  lora_edge_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
#if defined(LORA_EDGE_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void entered([[maybe_unused]] Fiber& main) {
#if defined(LORA_EDGE_ASAN)
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (main.stack == nullptr) main.stack = static_cast<char*>(const_cast<void*>(bottom)), main.stack_bytes = bytes;
#endif
}

}  // namespace lora_edge::emulator
