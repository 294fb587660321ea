#include "mps/shader_library.h"

#include <dlfcn.h>

#include <mutex>
#include <unordered_map>

namespace mkrs::mps {
namespace {

// torch keeps the text of the last exception behind its C shim from 2.12 on; 2.11 only logs it.
std::string last_torch_error() {
  using What = const char* (*)();
  static const What what =
      reinterpret_cast<What>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  const char* text = what == nullptr ? nullptr : what();
  return text == nullptr ? "an error that torch has logged above" : text;
}

struct Library {
  std::mutex mutex;
  std::unordered_map<std::string, AOTIMetalKernelFunctionHandle> functions;
};

// Never destroyed: Metal objects must not outlive the runtime that static destruction tears down.
Library& library() {
  static Library* instance = new Library();
  return *instance;
}

std::string join(const char* function, std::initializer_list<const char*> arguments,
                 const char* separator) {
  std::string text = function;
  for (const char* argument : arguments) text.append(separator).append(argument);
  return text;
}

}  // namespace

AOTIMetalKernelFunctionHandle kernel(const char* op, const char* file, const char* function,
                                     std::initializer_list<const char*> arguments) {
  const std::string name = join(function, arguments, "_");
  Library& lib = library();
  // One lock for lookup and compilation: torch's shader libraries are not built concurrently.
  const std::lock_guard<std::mutex> lock(lib.mutex);
  const auto known = lib.functions.find(name);
  if (known != lib.functions.end()) return known->second;

  const char* source = shader_source(file);
  MKRS_CHECK(source != nullptr, op, "mps_kernels/", file, ".metal must be in the build, got none");
  std::string list;
  for (const char* argument : arguments) list.append(list.empty() ? "" : ", ").append(argument);
  const std::string instance = std::string(function) + "<" + list + ">";
  const std::string text = std::string(source) + "\ntemplate [[host_name(\"" + name +
                           "\")]] [[kernel]] decltype(" + instance + ") " + instance + ";\n";
  AOTIMetalShaderLibraryHandle shaders = nullptr;
  AOTIMetalKernelFunctionHandle handle = nullptr;
  // A library that failed is not kept: the next call tries again and reports again.
  const bool built =
      aoti_torch_mps_create_shader_library(text.c_str(), &shaders) == AOTI_TORCH_SUCCESS &&
      shaders != nullptr;
  const bool found = built && aoti_torch_mps_get_kernel_function(shaders, name.c_str(), &handle) ==
                                  AOTI_TORCH_SUCCESS;
  if (!found || handle == nullptr) {
    const std::string why = last_torch_error();
    if (built) aoti_torch_mps_delete_shader_library(shaders);
    fail(op, "Metal (macOS 14 or later) must compile the kernel ", name, ", got: ", why,
         "; the CPU can still run it, on tensors moved with .cpu()");
  }
  lib.functions.emplace(name, handle);
  return handle;
}

const char* metal_type(Float type) {
  return type == Float::F32 ? "float" : type == Float::F16 ? "half" : "bfloat";
}

const char* metal_scheme(Scheme scheme) {
  return scheme == Scheme::Symmetric    ? "SYMMETRIC"
         : scheme == Scheme::Asymmetric ? "ASYMMETRIC"
                                        : "AFFINE";
}

const char* metal_bool(bool value) {
  return value ? "true" : "false";
}

const char* metal_int(int64_t value) {
  static const auto* const names = [] {
    auto* list = new std::array<std::string, 65>();
    for (size_t i = 0; i < list->size(); ++i) (*list)[i] = std::to_string(i);
    return list;
  }();
  return names->at(static_cast<size_t>(value)).c_str();
}

Launch::Argument& Launch::next() {
  MKRS_CHECK(count_ < arguments_.size(), op_, "a kernel takes at most ", arguments_.size(),
             " arguments, got more");
  return arguments_[count_++];
}

Launch& Launch::tensor(const Tensor& t) {
  next().tensor = t.get();
  return *this;
}

Launch& Launch::pair(int64_t low, int64_t high, const char* what) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  MKRS_CHECK(low >= 0 && low < kLimit && high >= 0 && high < kLimit, op_, what,
             " must be below 2**31 on mps, got ", low, " and ", high);
  next().value = low | (high << 32);
  return *this;
}

void Launch::encode(AOTIMetalKernelFunctionHandle function, void* data) {
  Launch& self = *static_cast<Launch*>(data);
  const auto failed = [&self](AOTITorchError error, const char* call) {
    if (error == AOTI_TORCH_SUCCESS) return false;
    self.failed_ = call;
    self.message_ = last_torch_error();
    return true;
  };
  if (failed(aoti_torch_mps_start_encoding(function), "start_encoding")) return;
  for (unsigned i = 0; i < self.count_; ++i) {
    const Argument& a = self.arguments_[i];
    if (a.tensor != nullptr) {
      if (failed(aoti_torch_mps_set_arg_tensor(function, i, a.tensor), "set_arg_tensor")) return;
    } else {
      if (failed(aoti_torch_mps_set_arg_int(function, i, a.value), "set_arg_int")) return;
    }
  }
  failed(aoti_torch_mps_dispatch_array_with_group_size(function, self.length_, 3, self.group_, 3),
         "dispatch");
}

void Launch::run(Grid groups, Grid threads) {
  // Metal counts a grid in threads.
  length_[0] = groups.x * threads.x;
  length_[1] = groups.y * threads.y;
  length_[2] = groups.z * threads.z;
  group_[0] = threads.x;
  group_[1] = threads.y;
  group_[2] = threads.z;
  // Errors are carried out by hand: the block runs under Objective-C frames.
  const AOTITorchError error = aoti_torch_mps_run_command_block(function_, &Launch::encode, this);
  if (failed_ == nullptr && error != AOTI_TORCH_SUCCESS) {
    failed_ = "run_command_block";
    message_ = last_torch_error();
  }
  MKRS_CHECK(failed_ == nullptr, op_, "Metal must accept the kernel call, got from ", failed_, ": ",
             message_);
}

}  // namespace mkrs::mps
