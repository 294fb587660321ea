// torch's C shim for Metal (torch/csrc/inductor/aoti_torch/c/shim_mps.h) over the SIMT engine:
// what a Mac's torch does with a GPU, done with the kernels compiled for the host.
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim_mps.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/library.h>

#include <array>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>

#include "device.h"
#include "engine.h"

namespace sim {
namespace {

// Python compiles: writes the library's path, or a message and returns 1.
using Compiler = int (*)(const char* source, char* answer, size_t size);
Compiler compiler = nullptr;

struct Function {
  const msl::Kernel* kernel = nullptr;
  std::vector<Binding> bindings{kMaxBuffers};
  std::array<int64_t, kMaxBuffers> values{};
  bool in_block = false;
  bool encoding = false;
};

struct Library {
  void* handle = nullptr;
  std::map<std::string, std::unique_ptr<Function>> functions;
};

Function* function_of(AOTIMetalKernelFunctionHandle handle) {
  TORCH_CHECK(handle != nullptr, "null Metal function");
  return reinterpret_cast<Function*>(handle);
}

msl::Element element_of(const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kByte:
      return msl::U8;
    case at::kChar:
      return msl::I8;
    case at::kShort:
      return msl::I16;
    case at::kInt:
      return msl::I32;
    case at::kLong:
      return msl::I64;
    case at::kHalf:
      return msl::F16;
    case at::kBFloat16:
      return msl::BF16;
    case at::kFloat:
      return msl::F32;
    case at::kBool:
      return msl::BOOL;
    default:
      return msl::OTHER;
  }
}

Binding& slot(Function* f, unsigned index, const char* what) {
  TORCH_CHECK(f->encoding, what, " outside start_encoding");
  TORCH_CHECK(index < kMaxBuffers, "kernel ", f->kernel->name, ": ", what, " of buffer ", index,
              "; Metal has ", kMaxBuffers);
  return f->bindings[index];
}

// ---- recorded calls ----------------------------------------------------------------------------
// Every kernel call with its memory before and after, for the engines that run them again without
// torch: replay.cpp under a sanitizer, cuda/replay.cu on a GPU. replay.h reads what this writes.
FILE* record = nullptr;

void put(const void* data, size_t size) {
  TORCH_CHECK(size == 0 || std::fwrite(data, 1, size, record) == size, "cannot record a call");
}

void put_number(uint64_t value) {
  put(&value, sizeof value);
}

// Which bytes of a buffer have been written: all of a value.
std::vector<uint8_t> written_of(const Binding& b) {
  if (b.written == nullptr) return std::vector<uint8_t>(b.size, 1);
  return {b.written, b.written + b.size};
}

void record_before(const Function& f, const uint32_t* grid, const uint32_t* group) {
  const std::string name = f.kernel->name;
  put_number(name.size());
  put(name.data(), name.size());
  for (int i = 0; i < 3; ++i) put_number(grid[i]);
  for (int i = 0; i < 3; ++i) put_number(group[i]);
  put_number(static_cast<uint64_t>(f.kernel->param_count));
  for (int i = 0; i < f.kernel->param_count; ++i) {
    const msl::Param& p = f.kernel->params[i];
    const Binding& b = f.bindings[static_cast<size_t>(p.index)];
    put_number(static_cast<uint64_t>(p.index));
    put_number(p.pointer);
    put_number(!p.read_only);
    // The same memory may be bound twice.
    int same = 0;
    while (f.bindings[static_cast<size_t>(f.kernel->params[same].index)].data != b.data) ++same;
    put_number(static_cast<uint64_t>(same));
    put_number(b.size);
    put(b.data, b.size);
  }
}

void record_after(const Function& f) {
  for (int i = 0; i < f.kernel->param_count; ++i) {
    const msl::Param& p = f.kernel->params[i];
    if (p.read_only) continue;
    const Binding& b = f.bindings[static_cast<size_t>(p.index)];
    put(b.data, b.size);
    const std::vector<uint8_t> written = written_of(b);
    put(written.data(), b.size);
  }
}

void launch(Function* f, const uint64_t* length, size_t dims, const uint64_t* group,
            size_t group_dims) {
  TORCH_CHECK(f->encoding, "dispatch outside start_encoding");
  TORCH_CHECK(dims >= 1 && dims <= 3 && dims == group_dims, "dispatch takes 1 to 3 dimensions");
  uint32_t l[3] = {1, 1, 1}, g[3] = {1, 1, 1};
  for (size_t i = 0; i < dims; ++i) {
    TORCH_CHECK(length[i] <= UINT32_MAX && group[i] <= UINT32_MAX, "kernel ", f->kernel->name,
                ": a grid dimension over 32 bits");
    l[i] = static_cast<uint32_t>(length[i]);
    g[i] = static_cast<uint32_t>(group[i]);
  }
  if (record != nullptr) record_before(*f, l, g);
  dispatch(*f->kernel, f->bindings, {l[0], l[1], l[2]}, {g[0], g[1], g[2]});
  if (record != nullptr) record_after(*f);
}

std::string json() {
  std::ostringstream out;
  out << "{\"kernels\":[";
  for (size_t i = 0; i < kernels_run().size(); ++i) {
    out << (i ? "," : "") << '"' << kernels_run()[i] << '"';
  }
  out << "],\"dispatches\":[";
  for (size_t i = 0; i < dispatches().size(); ++i) {
    const Dispatch& d = dispatches()[i];
    out << (i ? "," : "") << "{\"kernel\":\"" << d.kernel << "\",\"threads\":" << d.threads
        << ",\"threadgroup_memory\":" << d.threadgroup_memory << ",\"buffers\":[";
    for (size_t j = 0; j < d.traffic.size(); ++j) {
      const Traffic& t = d.traffic[j];
      out << (j ? "," : "") << "{\"index\":" << t.index << ",\"read\":" << t.read
          << ",\"written\":" << t.written << ",\"read_once\":" << t.read_once
          << ",\"fetched\":" << t.fetched << "}";
    }
    out << "]}";
  }
  out << "]}";
  return out.str();
}

}  // namespace
}  // namespace sim

using sim::function_of;
using torch::aot_inductor::tensor_handle_to_tensor_pointer;

extern "C" {

void sim_set_compiler(sim::Compiler c) {
  sim::compiler = c;
}
void sim_set_seeds(const uint64_t* seeds, size_t count) {
  sim::options().seeds.assign(seeds, seeds + count);
}
void sim_set_count(int count) {
  sim::options().count = count != 0;
}
// Calls from here on go to a file; a null path ends that. Returns 0 if the file cannot be written.
int sim_record(const char* path) {
  int ok = 1;
  if (sim::record != nullptr) ok = std::fclose(sim::record) == 0;
  sim::record = path == nullptr ? nullptr : std::fopen(path, "wb");
  return ok && (path == nullptr || sim::record != nullptr);
}
void sim_reset() {
  sim::dispatches().clear();
  sim::kernels_run().clear();
}
const char* sim_report() {
  static std::string text;
  text = sim::json();
  return text.c_str();
}

AOTITorchError aoti_torch_mps_create_shader_library(const char* source,
                                                    AOTIMetalShaderLibraryHandle* result){
    AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
      TORCH_CHECK(sim::compiler != nullptr, "the simulator has no compiler");
      std::string answer(1 << 16, '\0');
      const int status = sim::compiler(source, answer.data(), answer.size());
      answer.resize(answer.find('\0'));
      TORCH_CHECK(status == 0, "Failed to create metal library, error: ", answer);
      auto library = std::make_unique<sim::Library>();
      library->handle = dlopen(answer.c_str(), RTLD_NOW | RTLD_LOCAL);
      TORCH_CHECK(library->handle != nullptr, "cannot load compiled kernels: ", dlerror());
      *result = reinterpret_cast<AOTIMetalShaderLibraryHandle>(library.release());
    })}

AOTITorchError aoti_torch_mps_delete_shader_library(AOTIMetalShaderLibraryHandle handle){
    AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({ delete reinterpret_cast<sim::Library*>(handle); })}

AOTITorchError
    aoti_torch_mps_get_kernel_function(AOTIMetalShaderLibraryHandle handle, const char* name,
                                       AOTIMetalKernelFunctionHandle* result){
        AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
          auto* library = reinterpret_cast<sim::Library*>(handle);
          std::unique_ptr<sim::Function>& known = library->functions[name];
          if (!known) {
            const auto* kernels =
                static_cast<const msl::Kernel*>(dlsym(library->handle, "msl_kernels"));
            const auto* count = static_cast<const int*>(dlsym(library->handle, "msl_kernel_count"));
            TORCH_CHECK(kernels != nullptr && count != nullptr, "not a library of kernels");
            for (int i = 0; i < *count; ++i) {
              if (std::string(kernels[i].name) == name) {
                known = std::make_unique<sim::Function>();
                known->kernel = &kernels[i];
              }
            }
            TORCH_CHECK(known != nullptr, "Failed to create function state object for: ", name);
          }
          *result = reinterpret_cast<AOTIMetalKernelFunctionHandle>(known.get());
        })}

AOTITorchError aoti_torch_mps_start_encoding(AOTIMetalKernelFunctionHandle handle){
    AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
      sim::Function* f = function_of(handle);
      TORCH_CHECK(f->in_block, "start_encoding outside run_command_block");
      f->encoding = true;
      for (sim::Binding& b : f->bindings) b = sim::Binding();
    })}

AOTITorchError aoti_torch_mps_set_arg_tensor(AOTIMetalKernelFunctionHandle handle, unsigned index,
                                             AtenTensorHandle tensor){
    AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
      sim::Function* f = function_of(handle);
      const at::Tensor& t = *tensor_handle_to_tensor_pointer(tensor);
      TORCH_CHECK(t.is_mps(), "Expected all tensors to be on mps, buffer ", index, " is on ",
                  t.device());
      sim::Binding& b = sim::slot(f, index, "set_arg_tensor");
      const sim::Extent e = sim::extent_of(t);
      TORCH_CHECK(e.begin != nullptr, "kernel ", f->kernel->name, ": buffer ", index,
                  " is an empty tensor without memory");
      std::ostringstream what;
      what << t.scalar_type() << " tensor " << t.sizes();
      b.bound = b.is_tensor = true;
      b.element = sim::element_of(t);
      b.data = e.begin;
      b.size = e.size;
      b.written = e.size == 0 ? nullptr : sim::written_at(e.begin);
      b.what = what.str();
    })}

AOTITorchError
    aoti_torch_mps_set_arg_int(AOTIMetalKernelFunctionHandle handle, unsigned index,
                               int64_t value){AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
      sim::Function* f = function_of(handle);
      sim::Binding& b = sim::slot(f, index, "set_arg_int");
      f->values[index] = value;
      b.bound = true;
      b.is_tensor = false;
      b.data = reinterpret_cast<char*>(&f->values[index]);
      b.size = 8;
      b.written = nullptr;
      b.what = "value";
    })}

AOTITorchError aoti_torch_mps_dispatch_array_with_group_size(
    AOTIMetalKernelFunctionHandle handle, const uint64_t* length, size_t length_size,
    const uint64_t* group_size, size_t group_size_size){AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
  sim::launch(function_of(handle), length, length_size, group_size, group_size_size);
})}

AOTITorchError aoti_torch_mps_dispatch_single_with_group_size(AOTIMetalKernelFunctionHandle handle,
                                                              uint64_t length, uint64_t group_size){
    AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
      sim::launch(function_of(handle), &length, 1, &group_size, 1);
    })}

AOTITorchError aoti_torch_mps_run_command_block(AOTIMetalKernelFunctionHandle handle,
                                                aoti_torch_mps_command_block_callback_t callback,
                                                void* user_data) {
  AOTI_TORCH_CONVERT_EXCEPTION_TO_ERROR_CODE({
    // A Mac runs blocks on the stream's serial queue.
    static std::recursive_mutex* queue = new std::recursive_mutex();
    const std::lock_guard<std::recursive_mutex> lock(*queue);
    sim::Function* f = function_of(handle);
    TORCH_CHECK(!f->in_block, "run_command_block inside itself");
    struct Block {
      sim::Function* f;
      explicit Block(sim::Function* function) : f(function) { f->in_block = true; }
      ~Block() { f->in_block = f->encoding = false; }
    } block(f);
    callback(handle, user_data);
  })
}
}

namespace {

void check(AOTITorchError error) {
  TORCH_CHECK(error == AOTI_TORCH_SUCCESS,
              torch::csrc::shim::details::get_torch_exception_what_without_backtrace());
}

// Runs one kernel of a source through the shim: the simulator's own tests.
void launch_source(const std::string& source, const std::string& name, at::TensorList tensors,
                   at::IntArrayRef tensor_indices, at::IntArrayRef values,
                   at::IntArrayRef value_indices, at::IntArrayRef grid, at::IntArrayRef group) {
  AOTIMetalShaderLibraryHandle library = nullptr;
  check(aoti_torch_mps_create_shader_library(source.c_str(), &library));
  AOTIMetalKernelFunctionHandle function = nullptr;
  check(aoti_torch_mps_get_kernel_function(library, name.c_str(), &function));
  std::function<void()> body = [&] {
    check(aoti_torch_mps_start_encoding(function));
    for (size_t i = 0; i < tensors.size(); ++i) {
      at::Tensor t = tensors[i];
      check(aoti_torch_mps_set_arg_tensor(function, static_cast<unsigned>(tensor_indices[i]),
                                          reinterpret_cast<AtenTensorHandle>(&t)));
    }
    for (size_t i = 0; i < values.size(); ++i) {
      check(
          aoti_torch_mps_set_arg_int(function, static_cast<unsigned>(value_indices[i]), values[i]));
    }
    std::vector<uint64_t> lengths(grid.begin(), grid.end()), groups(group.begin(), group.end());
    check(aoti_torch_mps_dispatch_array_with_group_size(function, lengths.data(), lengths.size(),
                                                        groups.data(), groups.size()));
  };
  check(aoti_torch_mps_run_command_block(
      function,
      [](AOTIMetalKernelFunctionHandle, void* data) {
        (*static_cast<std::function<void()>*>(data))();
      },
      &body));
}

}  // namespace

TORCH_LIBRARY(metal_sim, m) {
  m.def(
      "launch(str source, str name, Tensor[] tensors, int[] tensor_indices, int[] values, "
      "int[] value_indices, int[] grid, int[] group) -> ()");
}
TORCH_LIBRARY_IMPL(metal_sim, CompositeExplicitAutograd, m) {
  m.impl("launch", launch_source);
}
