// Metal kernels by name, and their launch, on torch's C shim for MPS.
//
// A kernel is a template in mps_kernels/ and the arguments of one instantiation. It is compiled the
// first time it is asked for (source = file + one instantiation line), so a model pays for what it
// uses only. Compiled kernels live as long as the process.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>

#include <array>
#include <initializer_list>
#include <string>

#include "checks.h"

namespace mkrs::mps {

// Flattened source of mps_kernels/<name>.metal; null if there is none (embed_shaders.py).
const char* shader_source(const char* name);

// The kernel `function<arguments...>` of mps_kernels/<file>.metal, compiled if this is its first
// use. Its Metal name lists its parameters: function_argument_argument...
AOTIMetalKernelFunctionHandle kernel(const char* op, const char* file, const char* function,
                                     std::initializer_list<const char*> arguments);

// Names that stand for types and values in a kernel's arguments.
const char* metal_type(Float type);
const char* metal_scheme(Scheme scheme);
const char* metal_bool(bool value);
const char* metal_int(int64_t value);  // 0..64

struct Grid {
  uint64_t x = 1, y = 1, z = 1;
};

// One kernel call. Arguments are kept until `run` encodes them all in one command block.
class Launch {
 public:
  Launch(const char* op, AOTIMetalKernelFunctionHandle function) : op_(op), function_(function) {}

  Launch& tensor(const Tensor& t);
  // Two 32-bit values in one argument; a value that does not fit is an error that names `what`.
  Launch& pair(int64_t low, int64_t high, const char* what);
  // `groups` threadgroups of `threads` threads.
  void run(Grid groups, Grid threads);

 private:
  struct Argument {
    AtenTensorHandle tensor = nullptr;
    int64_t value = 0;
  };
  static void encode(AOTIMetalKernelFunctionHandle function, void* self);
  Argument& next();

  const char* op_;
  AOTIMetalKernelFunctionHandle function_;
  std::array<Argument, 12> arguments_;
  unsigned count_ = 0;
  uint64_t length_[3] = {}, group_[3] = {};
  const char* failed_ = nullptr;  // the shim call that returned an error
  std::string message_;
};

}  // namespace mkrs::mps
