#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "cpu/isa.h"
#include "cpu/threads.h"

namespace mkrs {
namespace {

// JSON by hand: names of levels and numbers need no escaping; MKRS_CPU_ISA is left to the reader.
std::string cpu_info() {
  std::string levels;
  for (const std::string& name : cpu::available_isas()) {
    levels += (levels.empty() ? "\"" : ", \"") + name + '"';
  }
  std::string thresholds;
  for (const cpu::Threshold& t : cpu::thresholds()) {
    thresholds += (thresholds.empty() ? "\"" : ", \"") + std::string(t.name) +
                  "\": " + std::to_string(t.value);
  }
  return "{\"level\": \"" + std::string(cpu::kernels().name) + "\", \"available\": [" + levels +
         "], \"thresholds\": {\"elements_per_thread\": " + std::to_string(cpu::kElementsPerThread) +
         (thresholds.empty() ? "" : ", ") + thresholds + "}}";
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CompositeExplicitAutograd, m) {
  m.impl("_cpu_info", TORCH_BOX(&mkrs::cpu_info));
}
