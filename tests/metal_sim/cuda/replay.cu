// Runs recorded kernel calls on an NVIDIA GPU and compares every byte of their outputs.
//   replay CALLS [REPEATS] [KERNEL-PREFIX]
// Prints one JSON object; exits 1 if a byte differs, 2 if a call cannot be run.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>

#include "../replay.h"
#include "metal_stdlib"

extern const msl::Kernel* const kTables[];
extern const int kTableSizes[];
extern const int kTableCount;

namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "replay: %s: %s\n", what.c_str(), cudaGetErrorString(error));
  std::exit(2);
}

// An allocation of exactly the size, so that compute-sanitizer sees a byte too many.
struct Memory {
  char* data = nullptr;
  explicit Memory(const std::vector<char>& from) {
    check(cudaMalloc(&data, from.empty() ? 1 : from.size()), "cudaMalloc");
    set(from);
  }
  ~Memory() { cudaFree(data); }
  Memory(const Memory&) = delete;
  void set(const std::vector<char>& from) {
    check(cudaMemcpy(data, from.data(), from.size(), cudaMemcpyHostToDevice), "copy to the GPU");
  }
};

struct Result {
  int calls = 0;
  int wrong = 0;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: replay CALLS [REPEATS] [KERNEL-PREFIX]\n");
    return 2;
  }
  const int repeats = count > 2 ? std::atoi(arguments[2]) : 1;
  const std::string prefix = count > 3 ? arguments[3] : "";
  std::map<std::string, msl::Launch> kernels;
  for (int t = 0; t < kTableCount; ++t) {
    for (int i = 0; i < kTableSizes[t]; ++i) kernels[kTables[t][i].name] = kTables[t][i].launch;
  }
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0), "no GPU");

  std::map<std::string, Result> results;  // by function
  int calls = 0, wrong = 0;
  std::map<std::string, int> instances;
  replay::Reader reader(arguments[1]);
  replay::Call call;
  while (reader.next(call)) {
    if (call.kernel.compare(0, prefix.size(), prefix) != 0) continue;
    const auto found = kernels.find(call.kernel);
    if (found == kernels.end()) {
      std::fprintf(stderr, "replay: no kernel %s in this build\n", call.kernel.c_str());
      return 2;
    }
    unsigned groups[3], threads[3];
    for (int i = 0; i < 3; ++i) {
      if (call.grid[i] % call.group[i] != 0) {
        std::fprintf(stderr, "replay: %s: a grid that is no whole number of threadgroups\n",
                     call.kernel.c_str());
        return 2;
      }
      groups[i] = static_cast<unsigned>(call.grid[i] / call.group[i]);
      threads[i] = static_cast<unsigned>(call.group[i]);
    }
    msl::Arguments values{};
    std::vector<std::unique_ptr<Memory>> memory(call.arguments.size());
    for (size_t i = 0; i < call.arguments.size(); ++i) {
      const replay::Argument& a = call.arguments[i];
      if (a.index >= 16) return 2;
      if (a.pointer) {
        if (a.same == i) memory[i].reset(new Memory(a.before));
        values.pointer[a.index] = memory[a.same]->data;
      } else {
        std::memcpy(&values.value[a.index], a.before.data(), sizeof(long));
      }
    }
    // Kernel names list their parameters behind the function's name.
    std::string function = call.kernel;
    for (const char* type : {"_float", "_half", "_bfloat"}) {
      function = function.substr(0, std::min(function.size(), function.find(type)));
    }
    Result& result = results[function];
    ++result.calls;
    ++calls;
    ++instances[call.kernel];
    bool bad = false;
    for (int turn = 0; turn < repeats; ++turn) {
      for (size_t i = 0; i < memory.size(); ++i) {
        const replay::Argument& a = call.arguments[i];
        if (turn > 0 && a.writable && a.same == i) memory[i]->set(a.before);
      }
      found->second(values, dim3(groups[0], groups[1], groups[2]),
                    dim3(threads[0], threads[1], threads[2]));
      check(cudaGetLastError(), call.kernel);
      check(cudaDeviceSynchronize(), call.kernel);
      for (size_t i = 0; i < memory.size(); ++i) {
        const replay::Argument& a = call.arguments[i];
        if (!a.writable || a.same != i) continue;
        std::vector<char> got(a.before.size());
        check(cudaMemcpy(got.data(), memory[i]->data, got.size(), cudaMemcpyDeviceToHost),
              "copy from the GPU");
        const size_t different = replay::differing(a, got);
        if (different == 0 || bad) continue;
        bad = true;
        std::fprintf(stderr, "replay: %s: %zu of %zu bytes of buffer %d differ (turn %d)\n",
                     call.kernel.c_str(), different, got.size(), static_cast<int>(a.index), turn);
      }
    }
    result.wrong += bad;
    wrong += bad;
  }
  std::printf(
      "{\"device\": \"%s\", \"repeats\": %d, \"calls\": %d, \"kernels\": %zu, \"wrong\": %d, "
      "\"functions\": {",
      device.name, repeats, calls, instances.size(), wrong);
  const char* comma = "";
  for (const auto& entry : results) {
    std::printf("%s\"%s\": {\"calls\": %d, \"wrong\": %d}", comma, entry.first.c_str(),
                entry.second.calls, entry.second.wrong);
    comma = ", ";
  }
  std::printf("}}\n");
  return wrong == 0 && calls > 0 ? 0 : 1;
}
