// Runs recorded kernel calls on the simulator's engine without torch: where torch is not, as under
// an emulated arm64. The kernels are linked in.
//   engine_replay CALLS SEED
#include <map>
#include <stdexcept>

#include "engine.h"
#include "replay.h"

struct Table {
  const msl::Kernel* kernels;
  int count;
};
extern const Table kTables[];
extern const int kTableCount;

int main(int count, char** arguments) {
  if (count != 3) {
    std::fprintf(stderr, "usage: engine_replay CALLS SEED\n");
    return 2;
  }
  sim::options().seeds = {std::strtoull(arguments[2], nullptr, 10)};
  std::map<std::string, const msl::Kernel*> kernels;
  for (int t = 0; t < kTableCount; ++t) {
    for (int i = 0; i < kTables[t].count; ++i) {
      kernels[kTables[t].kernels[i].name] = &kTables[t].kernels[i];
    }
  }
  replay::Reader reader(arguments[1]);
  replay::Call call;
  int calls = 0, wrong = 0;
  while (reader.next(call)) {
    const auto found = kernels.find(call.kernel);
    if (found == kernels.end()) continue;
    const msl::Kernel& kernel = *found->second;
    std::vector<sim::Binding> bindings(sim::kMaxBuffers);
    std::vector<std::vector<char>> memory(call.arguments.size());
    for (size_t i = 0; i < memory.size(); ++i) {
      const replay::Argument& a = call.arguments[i];
      memory[i] = a.before;
      sim::Binding& b = bindings[a.index];
      b.bound = true;
      b.is_tensor = a.pointer;
      b.data = memory[a.same].data();
      b.size = a.before.size();
      b.what = "recorded tensor";
    }
    for (int i = 0; i < kernel.param_count; ++i) {
      bindings[static_cast<size_t>(kernel.params[i].index)].element = kernel.params[i].element;
    }
    const auto size = [](const uint64_t* n) {
      return msl::Size3{static_cast<msl::u32>(n[0]), static_cast<msl::u32>(n[1]),
                        static_cast<msl::u32>(n[2])};
    };
    try {
      sim::dispatch(kernel, bindings, size(call.grid), size(call.group));
    } catch (const std::runtime_error& error) {
      std::fprintf(stderr, "%s\n", error.what());
      return 3;
    }
    ++calls;
    for (size_t i = 0; i < memory.size(); ++i) {
      const replay::Argument& a = call.arguments[i];
      if (!a.writable || a.same != i || replay::differing(a, memory[i]) == 0) continue;
      ++wrong;
      std::fprintf(stderr, "%s: %zu of %zu bytes of buffer %d differ\n", call.kernel.c_str(),
                   replay::differing(a, memory[i]), memory[i].size(), static_cast<int>(a.index));
    }
  }
  std::printf("%d calls, %d wrong\n", calls, wrong);
  return wrong == 0 && calls > 0 ? 0 : 1;
}
