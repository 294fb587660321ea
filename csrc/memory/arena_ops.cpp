// Arenas as ops: handles are numbers, blocks become tensors whose deleter releases them.
#include "memory/arena_ops.h"

#include <torch/csrc/stable/c/shim.h>

#include <tuple>

#include "checks.h"
#include "memory/handles.h"
#include "memory/pages.h"

namespace mkrs::memory {
namespace {

// A block held by Python, with one reference of its own.
struct HeldBlock {
  explicit HeldBlock(Block* b) : block(b) {}
  ~HeldBlock() { release(block); }
  HeldBlock(const HeldBlock&) = delete;
  HeldBlock& operator=(const HeldBlock&) = delete;
  Block* block;
};

// Leaked: tensors may die after static destructors have run.
Handles<Arena>& arenas() {
  static auto* handles = new Handles<Arena>("the arena");
  return *handles;
}
Handles<Frame>& frames() {
  static auto* handles = new Handles<Frame>("the frame");
  return *handles;
}
Handles<HeldBlock>& blocks() {
  static auto* handles = new Handles<HeldBlock>("the block");
  return *handles;
}

// Bytes of an element; torch's headers have no such function.
int64_t item_size(const char* op, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Bool:
    case ScalarType::Float8_e4m3fn:
    case ScalarType::Float8_e4m3fnuz:
    case ScalarType::Float8_e5m2:
    case ScalarType::Float8_e5m2fnuz:
    case ScalarType::Float8_e8m0fnu:
      return 1;
    case ScalarType::Short:
    case ScalarType::UInt16:
    case ScalarType::Half:
    case ScalarType::BFloat16:
      return 2;
    case ScalarType::Int:
    case ScalarType::UInt32:
    case ScalarType::Float:
      return 4;
    case ScalarType::Long:
    case ScalarType::UInt64:
    case ScalarType::Double:
    case ScalarType::ComplexFloat:
      return 8;
    case ScalarType::ComplexDouble:
      return 16;
    default:
      fail(op, "dtype must be one that tensors of a checkpoint have, got another");
  }
}

constexpr int64_t kMaxBytes = int64_t{1} << 60;  // sums of a few must not overflow

int64_t checked_bytes(const char* op, const int64_t* size, size_t dims, int64_t item_bytes) {
  int64_t bytes = item_bytes;
  for (size_t i = 0; i < dims; ++i) {
    MKRS_CHECK(size[i] >= 0, op, "sizes must not be negative, got ", size[i]);
    MKRS_CHECK(!__builtin_mul_overflow(bytes, size[i], &bytes) && bytes < kMaxBytes, op,
               "the size must be less than 2**60 bytes, got more");
  }
  return bytes;
}

int64_t checked_bytes(const char* op, const std::vector<int64_t>& size, ScalarType dtype) {
  return checked_bytes(op, size.data(), size.size(), item_size(op, dtype));
}

// A tensor over `data` that owns one reference to `block`, which it takes over from the caller.
Tensor tensor_over(Block* block, char* data, const std::vector<int64_t>& size, ScalarType dtype) {
  std::vector<int64_t> strides(size.size());
  contiguous_strides(size.data(), size.size(), strides.data());
  const auto shim_dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  const AOTITorchError status = torch_from_blob(
      data, static_cast<int64_t>(size.size()), size.data(), strides.data(), 0, shim_dtype,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) { release(static_cast<Block*>(context)); }, block);
  if (status != AOTI_TORCH_SUCCESS) {
    release(block);
    throw std::runtime_error("mkrs::arena: torch refused a tensor over a block");
  }
  return Tensor(handle);
}

// Runs `fn`, with the arena's errors worded as errors of the op.
template <typename F>
auto guarded(const char* op, const F& fn) {
  try {
    return fn();
  } catch (const OverBudget& error) {
    fail(op, "over budget: ", error.what());
  } catch (const std::bad_alloc&) {
    fail(op, "out of memory: the system gives no more");
  }
}

int64_t arena_create(int64_t budget, const std::string& strategy, int64_t max_cached) {
  const char* op = "arena_create";
  Strategy chosen = Strategy::Pooled;
  if (strategy == "bump") {
    chosen = Strategy::Bump;
  } else if (strategy == "none") {
    chosen = Strategy::None;
  } else {
    MKRS_CHECK(strategy == "pooled", op, "strategy must be 'pooled', 'bump' or 'none', got '",
               strategy, "'");
  }
  return arenas().add(std::make_shared<Arena>(budget, chosen, max_cached));
}

void arena_close(int64_t arena) {
  if (const auto taken = arenas().take(arena)) taken->close();
}

Tensor arena_empty(int64_t arena, std::vector<int64_t> size, ScalarType dtype) {
  Block* block = acquire_for(arena, size.data(), size.size(), item_size("arena_empty", dtype));
  return tensor_over(block, block->data, size, dtype);
}

int64_t arena_trim(int64_t arena, int64_t keep) {
  return arenas().get("arena_trim", arena)->trim(keep);
}

std::vector<int64_t> arena_stats(int64_t arena) {
  const Stats s = arenas().get("arena_stats", arena)->stats();
  return {s.active, s.requested, s.cached, s.peak, s.reserved_peak, s.allocations, s.hits, s.live};
}

int64_t arena_frame_open(int64_t arena, int64_t size_hint) {
  return frames().add(std::make_shared<Frame>(arenas().get("arena_frame_open", arena), size_hint));
}

Tensor arena_frame_empty(int64_t frame, std::vector<int64_t> size, ScalarType dtype) {
  const char* op = "arena_empty";
  const auto owner = frames().get(op, frame);
  const int64_t bytes = checked_bytes(op, size, dtype);
  char* data = nullptr;
  Block* block = guarded(op, [&] { return owner->acquire(bytes, &data); });
  return tensor_over(block, data, size, dtype);
}

void arena_frame_close(int64_t frame) {
  if (const auto taken = frames().take(frame)) taken->close();
}

int64_t arena_block(int64_t arena, int64_t bytes) {
  const char* op = "arena_empty";
  MKRS_CHECK(bytes >= 0, op, "sizes must not be negative, got ", bytes);
  MKRS_CHECK(bytes < kMaxBytes, op, "the size must be less than 2**60 bytes, got ", bytes);
  const auto owner = arenas().get(op, arena);
  Block* block = guarded(op, [&] { return owner->acquire(bytes); });
  return blocks().add(std::make_shared<HeldBlock>(block));
}

// A block over a tensor's bytes, which are pages of a map that can be read again.
int64_t arena_block_over(int64_t arena, Tensor view, int64_t charge) {
  const char* op = "arena_empty";
  MKRS_CHECK(view.is_cpu() && view.scalar_type() == ScalarType::Byte && view.is_contiguous(), op,
             "the view must be contiguous uint8 on the cpu, got another");
  MKRS_CHECK(charge >= 0 && charge < kMaxBytes, op, "the charge must be a size, got ", charge);
  const auto owner = arenas().get(op, arena);
  char* data = static_cast<char*>(view.mutable_data_ptr());
  const int64_t bytes = view.numel();
  Block* block = guarded(op, [&] {
    return owner->borrow(data, bytes, charge, [view, data, bytes] { drop_pages(data, bytes); });
  });
  return blocks().add(std::make_shared<HeldBlock>(block));
}

Tensor arena_block_tensor(int64_t handle, int64_t offset, std::vector<int64_t> size,
                          ScalarType dtype) {
  const char* op = "arena_block_tensor";
  const auto held = blocks().get(op, handle);
  const int64_t bytes = checked_bytes(op, size, dtype);
  const int64_t usable = held->block->done ? held->block->requested : held->block->size;
  MKRS_CHECK(offset >= 0 && offset <= usable && bytes <= usable - offset, op,
             "the tensor must lie in the block of ", usable, " bytes, got ", bytes, " bytes at ",
             offset);
  retain(held->block);
  return tensor_over(held->block, held->block->data + offset, size, dtype);
}

// Tensors alive over the block.
int64_t arena_block_tensors(int64_t handle) {
  return blocks().get("arena_block_tensors", handle)->block->refs.load(std::memory_order_acquire) -
         1;
}

int64_t arena_block_size(int64_t handle) {
  return blocks().get("arena_block_size", handle)->block->size;
}

void arena_block_release(int64_t handle) {
  blocks().take(handle);
}

}  // namespace

Block* acquire_for(int64_t arena, const int64_t* size, size_t dims, int64_t item_bytes) {
  const char* op = "arena_empty";
  const auto owner = arenas().get(op, arena);
  MKRS_CHECK(owner->strategy() != Strategy::Bump, op,
             "a 'bump' arena allocates inside `with arena.frame()`, got an allocation outside");
  const int64_t bytes = checked_bytes(op, size, dims, item_bytes);
  return guarded(op, [&] { return owner->acquire(bytes); });
}

void contiguous_strides(const int64_t* size, size_t dims, int64_t* strides) {
  int64_t step = 1;
  for (size_t i = dims; i-- > 0;) {
    strides[i] = step;
    step *= size[i] > 0 ? size[i] : 1;
  }
}

}  // namespace mkrs::memory

// Composite: most of these have no tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(mkrs, CompositeExplicitAutograd, m) {
  using namespace mkrs::memory;
  m.impl("_arena_create", TORCH_BOX(&arena_create));
  m.impl("_arena_close", TORCH_BOX(&arena_close));
  m.impl("_arena_empty", TORCH_BOX(&arena_empty));
  m.impl("_arena_trim", TORCH_BOX(&arena_trim));
  m.impl("_arena_stats", TORCH_BOX(&arena_stats));
  m.impl("_arena_frame_open", TORCH_BOX(&arena_frame_open));
  m.impl("_arena_frame_empty", TORCH_BOX(&arena_frame_empty));
  m.impl("_arena_frame_close", TORCH_BOX(&arena_frame_close));
  m.impl("_arena_block", TORCH_BOX(&arena_block));
  m.impl("_arena_block_over", TORCH_BOX(&arena_block_over));
  m.impl("_arena_block_tensor", TORCH_BOX(&arena_block_tensor));
  m.impl("_arena_block_tensors", TORCH_BOX(&arena_block_tensors));
  m.impl("_arena_block_size", TORCH_BOX(&arena_block_size));
  m.impl("_arena_block_release", TORCH_BOX(&arena_block_release));
}
