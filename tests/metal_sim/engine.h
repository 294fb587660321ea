// The SIMT engine: runs a kernel over a grid, one fiber a Metal thread, and checks what it does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "msl_runtime.h"

namespace sim {

// What is bound to one buffer index.
struct Binding {
  bool bound = false;
  bool is_tensor = false;             // false: 8 bytes set by value
  msl::Element element = msl::OTHER;  // of a tensor
  char* data = nullptr;               // first byte that may be touched
  size_t size = 0;                    // bytes of the tensor's extent
  uint8_t* written = nullptr;         // a byte for each byte: was it ever written; null: all were
  std::string what;                   // for messages: "uint8 tensor [4, 32]"
};

struct Traffic {
  int index = 0;
  uint64_t read = 0, written = 0;  // bytes asked for
  uint64_t read_once = 0;          // different bytes read
  uint64_t fetched = 0;            // bytes that missed the modelled cache
};

struct Dispatch {
  std::string kernel;
  uint64_t threads = 0;
  uint64_t threadgroup_memory = 0;
  std::vector<Traffic> traffic;
};

struct Options {
  // Orders of threads and threadgroups: 0 is in order, others are shuffled. Every kernel call runs
  // in each of them on the same memory, and all must leave the same bits.
  std::vector<uint64_t> seeds{0};
  bool count = false;  // keep a Dispatch of every call
};

Options& options();
std::vector<Dispatch>& dispatches();
std::vector<std::string>& kernels_run();

constexpr unsigned kMaxBuffers = 31;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxThreadgroupMemory = 32768;

// Runs a kernel in every order of options().seeds. Throws std::runtime_error with everything that is
// known about the first fault.
void dispatch(const msl::Kernel& kernel, const std::vector<Binding>& bindings, msl::Size3 grid,
              msl::Size3 group);

}  // namespace sim
