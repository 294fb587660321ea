// Stacks and the switch between them.
#include "machine.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

// sim_switch(save, to): pushes the callee-saved registers, stores the stack pointer, takes `to`'s.
#if defined(__x86_64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, @function
sim_switch:
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
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl sim_switch
.hidden sim_switch
.type sim_switch, %function
sim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "the Metal simulator switches fibers on x86-64 and arm64 only"
#endif
extern "C" void sim_switch(void** save, void* to);

namespace sim {
namespace {

void start() {
  Machine& m = machine();
  m.kernel->entry(m.arguments, m.current->thread);
  m.current->state = State::Done;
  leave();
  std::abort();
}

}  // namespace

void scrub(Fiber& f, uint8_t byte) {
  if (f.stack == nullptr) {
    void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("no memory for a fiber's stack");
    mprotect(p, 4096, PROT_NONE);
    f.stack = static_cast<char*>(p);
  }
  std::memset(f.stack + kStack - kScrubbed, byte, kScrubbed);
}

void prepare(Fiber& f) {
  void** sp = reinterpret_cast<void**>(f.stack + kStack - 64);
#if defined(__x86_64__)
  *--sp = nullptr;  // keeps the stack 16-byte aligned at entry
  *--sp = reinterpret_cast<void*>(&start);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
#else
  sp -= 20;
  std::memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&start);  // x30
#endif
  f.sp = sp;
  f.state = State::Ready;
}

void enter(Fiber& f) {
  Machine& m = machine();
  m.current = &f;
  sim_switch(&m.scheduler, f.sp);
  m.current = nullptr;
}

void leave() {
  Machine& m = machine();
  sim_switch(&m.current->sp, m.scheduler);
}

[[noreturn]] void fail_at(const std::string& message, const void* pc) {
  Machine& m = machine();
  if (!m.failure.happened) m.failure = {true, message, pc, m.current->thread};
  m.current->state = State::Done;
  leave();
  std::abort();  // a failed fiber is never entered again
}

}  // namespace sim
