#include "device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

namespace sim {
namespace {

struct Allocation {
  size_t size;
  std::unique_ptr<uint8_t[]> written;
};

std::mutex& allocations_mutex() {
  static auto* m = new std::mutex();
  return *m;
}
std::map<uintptr_t, Allocation>& allocations() {
  static auto* map = new std::map<uintptr_t, Allocation>();
  return *map;
}

void release(void* p) {
  if (p == nullptr) return;
  {
    const std::lock_guard<std::mutex> lock(allocations_mutex());
    allocations().erase(reinterpret_cast<uintptr_t>(p));
  }
  std::free(p);
}

// New memory is all ones: NaN in every float format, so that an unwritten output shows.
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    const c10::Device device(c10::DeviceType::MPS, 0);
    if (n == 0) return {nullptr, nullptr, &release, device};
    ++activity().allocations;
    void* p = std::aligned_alloc(256, (n + 255) / 256 * 256);
    TORCH_CHECK(p != nullptr, "out of memory for ", n, " bytes");
    std::memset(p, 0xff, n);
    const std::lock_guard<std::mutex> lock(allocations_mutex());
    allocations()[reinterpret_cast<uintptr_t>(p)] = {n, std::make_unique<uint8_t[]>(n)};
    return {p, p, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Allocator allocator;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::MPS; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {c10::DeviceType::MPS, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device d) const override {
    return c10::Stream(c10::Stream::DEFAULT, d);
  }
  c10::Stream exchangeStream(c10::Stream s) const override { return s; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void synchronizeDevice(c10::DeviceIndex) const override { ++activity().waits; }
};
C10_REGISTER_GUARD_IMPL(MPS, Guard)

// What torch asks before it uses a device: that there is one, and nothing else.
struct Hooks final : at::MPSHooksInterface {
  Hooks() = default;
  void init() const override {}
  bool hasMPS() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void deviceSynchronize() const override { ++activity().waits; }
  void commitStream() const override { ++activity().waits; }
  void emptyCache() const override {}
  c10::Device getDeviceFromPtr(void*) const override { return {c10::DeviceType::MPS, 0}; }
  c10::Allocator* getMPSDeviceAllocator() const override { return &allocator; }
};

const c10::DispatchKeySet kKeys(c10::DispatchKey::MPS);

void mark_written(const at::Tensor& t) {
  const Extent e = extent_of(t);
  if (e.size == 0) return;
  if (uint8_t* written = written_at(e.begin)) std::memset(written, 1, e.size);
}

// The same memory as a CPU tensor.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.is_mps()) return t;
  const int64_t elements = static_cast<int64_t>(t.storage().nbytes() / t.element_size());
  void* data = t.storage().mutable_data();
  static char nothing[16];
  return at::from_blob(data == nullptr ? nothing : data, {elements},
                       t.options().device(at::kCPU).requires_grad(false))
      .as_strided(t.sizes(), t.strides(), t.storage_offset());
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> type,
                 std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(type.value_or(at::kFloat) != at::kDouble,
              "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
              "float64. Please use float32 instead.");
  return at::detail::empty_generic_symint(size, &allocator, kKeys, type.value_or(at::kFloat),
                                          format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> type, std::optional<at::Layout>,
                         std::optional<at::Device>, std::optional<bool>) {
  TORCH_CHECK(type.value_or(at::kFloat) != at::kDouble,
              "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support "
              "float64. Please use float32 instead.");
  return at::detail::empty_strided_symint_generic(size, stride, &allocator, kKeys,
                                                  type.value_or(at::kFloat));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  if (from.is_mps() && !to.is_mps()) ++activity().waits;
  at::Tensor target = on_host(to);
  target.copy_(on_host(from).expand_as(target));
  if (to.is_mps()) mark_written(to);
  return to;
}

at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  copy_from(from, to, non_blocking);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor as_strided(const at::Tensor& t, at::IntArrayRef size, at::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(t, size, stride, offset);
}

at::Tensor view(const at::Tensor& t, at::IntArrayRef size) {
  return at::native::view(t, size);
}

at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize_(const at::Tensor& t, c10::SymIntArrayRef size,
                          std::optional<at::MemoryFormat>) {
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = t.unsafeGetTensorImpl();
  int64_t elements = t.storage_offset();
  elements += c10::multiply_integers(sizes);
  const size_t bytes = static_cast<size_t>(elements) * t.element_size();
  if (bytes > t.storage().nbytes()) {
    c10::DataPtr data = allocator.allocate(bytes);
    if (t.storage().nbytes() > 0) {
      std::memcpy(data.get(), t.storage().data(), t.storage().nbytes());
      std::memset(written_at(data.get()), 1, t.storage().nbytes());
    }
    t.storage().unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    t.storage().unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(sizes);
  return t;
}

at::Tensor& fill_scalar(at::Tensor& t, const at::Scalar& value) {
  on_host(t).fill_(value);
  mark_written(t);
  return t;
}

at::Tensor& zero_(at::Tensor& t) {
  return fill_scalar(t, at::Scalar(0));
}

at::Scalar local_scalar(const at::Tensor& t) {
  ++activity().waits;
  return on_host(t).item();
}

at::Tensor& set_storage(at::Tensor& t, at::Storage source, int64_t offset, at::IntArrayRef size,
                        at::IntArrayRef stride) {
  t.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  t.unsafeGetTensorImpl()->set_storage_offset(offset);
  t.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride);
  return t;
}

// Everything else runs on the CPU on copies, as torch's own MPS fallback does.
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  TORCH_CHECK(std::strncmp(op.schema().name().c_str(), "mkrs::", 6) != 0, "Could not run '",
              op.schema().name(), "' with arguments from the 'MPS' backend");
  at::native::cpu_fallback(op, stack);
}

}  // namespace

uint8_t* written_at(const void* p) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(p);
  const std::lock_guard<std::mutex> lock(allocations_mutex());
  auto it = allocations().upper_bound(address);
  if (it == allocations().begin()) return nullptr;
  --it;
  if (address - it->first >= it->second.size) return nullptr;
  return it->second.written.get() + (address - it->first);
}

Activity& activity() {
  static auto* a = new Activity();
  return *a;
}

Extent extent_of(const at::Tensor& t) {
  char* base = static_cast<char*>(t.storage().mutable_data());
  if (base == nullptr || t.numel() == 0) return {base, 0};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return {base + t.storage_offset() * t.element_size(),
          static_cast<size_t>(last + 1) * t.element_size()};
}

}  // namespace sim

namespace at {
using SimulatedHooks = sim::Hooks;
C10_REGISTER_CLASS(MPSHooksRegistry, MPSHooks, SimulatedHooks)
}  // namespace at

// Whether torch asks the hooks above. It does not if anything asked it for MPS before they were
// there: it keeps the first answer.
extern "C" int sim_is_asked() { return at::detail::getMPSHooks().hasMPS(); }

TORCH_LIBRARY_IMPL(aten, MPS, m) {
  m.impl("empty.memory_format", sim::empty);
  m.impl("empty_strided", sim::empty_strided);
  m.impl("_copy_from", sim::copy_from);
  m.impl("_copy_from_and_resize", sim::copy_from_and_resize);
  m.impl("copy_", sim::copy_);
  m.impl("as_strided", sim::as_strided);
  m.impl("view", sim::view);
  m.impl("_reshape_alias", sim::reshape_alias);
  m.impl("resize_", sim::resize_);
  m.impl("fill_.Scalar", sim::fill_scalar);
  m.impl("zero_", sim::zero_);
  m.impl("_local_scalar_dense", sim::local_scalar);
  m.impl("set_.source_Storage_storage_offset", sim::set_storage);
}

TORCH_LIBRARY_IMPL(_, MPS, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&sim::fallback>());
}
