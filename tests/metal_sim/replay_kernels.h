// The kernels that a replay is linked with; sanitize.py writes the tables.
#pragma once

#include <string>
#include <unordered_map>

#include "msl_runtime.h"

struct Table {
  const msl::Kernel* kernels;
  int count;
};
extern const Table kTables[];
extern const int kTableCount;

// Null if there is none of this name.
inline const msl::Kernel* find_kernel(const std::string& name) {
  static const auto* const kernels = [] {
    auto* map = new std::unordered_map<std::string, const msl::Kernel*>();
    for (int t = 0; t < kTableCount; ++t) {
      for (int i = 0; i < kTables[t].count; ++i) {
        (*map)[kTables[t].kernels[i].name] = &kTables[t].kernels[i];
      }
    }
    return map;
  }();
  const auto found = kernels->find(name);
  return found == kernels->end() ? nullptr : found->second;
}
