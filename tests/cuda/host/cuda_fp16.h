// CUDA's half on the CPU.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(h.bits);
}
