// Nanoseconds to make a tensor in C++ and to let go of it: from the arena, and as torch.empty does.
// One line per size: bytes, arena, torch. Both sides end with an at::Tensor that owns its memory,
// through the same C interface of torch; nothing is written into it.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "memory/arena.h"

using mkrs::memory::Arena;
using mkrs::memory::Block;
using mkrs::memory::Strategy;

namespace {

void check(AOTITorchError status) {
  if (status != AOTI_TORCH_SUCCESS) std::abort();
}

template <typename F>
double nanoseconds(const F& fn) {
  constexpr int kCycles = 5000;
  double best = 1e18;
  for (int repeat = 0; repeat < 7; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kCycles; ++i) fn();
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / kCycles);
  }
  return best;
}

}  // namespace

int main() {
  const auto arena = std::make_shared<Arena>(-1, Strategy::Pooled, -1);
  const int32_t dtype = aoti_torch_dtype_uint8(), cpu = aoti_torch_device_type_cpu();
  const int64_t stride = 1;
  for (const int64_t mib : {2, 16, 64}) {
    const int64_t bytes = mib << 20;
    const auto from_arena = [&] {
      Block* block = arena->acquire(bytes);
      AtenTensorHandle tensor = nullptr;
      check(torch_from_blob(
          block->data, 1, &bytes, &stride, 0, dtype, cpu, -1, &tensor, aoti_torch_layout_strided(),
          nullptr, 0, [](void*, void* context) { release(static_cast<Block*>(context)); }, block));
      check(aoti_torch_delete_tensor_object(tensor));
    };
    const auto from_torch = [&] {
      AtenTensorHandle tensor = nullptr;
      check(aoti_torch_empty_strided(1, &bytes, &stride, dtype, cpu, -1, &tensor));
      check(aoti_torch_delete_tensor_object(tensor));
    };
    std::printf("%lld %.0f %.0f\n", static_cast<long long>(bytes), nanoseconds(from_arena),
                nanoseconds(from_torch));
  }
  return 0;
}
