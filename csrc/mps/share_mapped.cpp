#include "mps/share_mapped.h"

#include <torch/csrc/stable/device.h>
#include <unistd.h>

#include <algorithm>

namespace mkrs::mps {
namespace {

const torch::stable::Device kDevice(torch::headeronly::DeviceType::MPS, 0);

// Rows [begin, end) of `host` over its own pages; nothing when Metal refuses.
// The only place where a Metal buffer becomes a torch tensor: for torch the data pointer of an MPS
// tensor is its MTLBuffer, and the place in the buffer is the storage offset.
std::optional<Tensor> share_rows(const Tensor& host, int64_t begin, int64_t end,
                                 int64_t row_bytes) {
  const uintptr_t page = static_cast<uintptr_t>(getpagesize());
  const uintptr_t first = reinterpret_cast<uintptr_t>(host.const_data_ptr()) +
                          static_cast<uintptr_t>(begin * row_bytes);
  const uintptr_t last = first + static_cast<uintptr_t>((end - begin) * row_bytes);
  const uintptr_t from = first / page * page, to = (last + page - 1) / page * page;
  void* buffer = buffer_over(reinterpret_cast<void*>(from), to - from);
  if (buffer == nullptr) return std::nullopt;
  std::vector<int64_t> sizes(static_cast<size_t>(host.dim())), strides(sizes.size());
  for (int64_t i = 0; i < host.dim(); ++i) {
    sizes[static_cast<size_t>(i)] = i == 0 ? end - begin : host.size(i);
    strides[static_cast<size_t>(i)] = host.stride(i);
  }
  return torch::stable::from_blob(
      buffer, torch::headeronly::IntHeaderOnlyArrayRef(sizes),
      torch::headeronly::IntHeaderOnlyArrayRef(strides), kDevice, host.scalar_type(),
      // The buffer goes first, then, with this function, the last owner of the pages.
      [host](void* data) { release_buffer(data); },
      static_cast<int64_t>(first - from) / static_cast<int64_t>(host.element_size()));
}

Shared copy(const Tensor& host, std::string why) {
  return {{torch::stable::to(host, kDevice)}, std::move(why)};
}

}  // namespace

Shared share_mapped(const Tensor& host) {
  const char* op = "mps_share";
  MKRS_CHECK(host.is_cpu(), op, "mapped must be on cpu, got a tensor on another device");
  MKRS_CHECK(host.is_contiguous(), op, "mapped must be contiguous, got shape ", shape_string(host),
             " with gaps");
  // A piece may need a page more at each end.
  const int64_t longest = longest_buffer() - 2 * static_cast<int64_t>(getpagesize());
  MKRS_CHECK(longest > 0, op, "a Metal device must be there, got none");
  const uintptr_t item = static_cast<uintptr_t>(host.element_size());
  if (host.numel() == 0 || host.dim() == 0) return copy(host, "a tensor without pages of its own");
  if (reinterpret_cast<uintptr_t>(host.const_data_ptr()) % item != 0) {
    return copy(host, "the file stores it at an address that is no multiple of its element size");
  }
  const int64_t rows = host.size(0);
  const int64_t row_bytes = host.numel() / rows * static_cast<int64_t>(item);
  if (row_bytes > longest) return copy(host, "one row is longer than Metal's longest buffer");
  const int64_t each = longest / row_bytes;
  Shared shared;
  for (int64_t begin = 0; begin < rows; begin += each) {
    std::optional<Tensor> piece = share_rows(host, begin, std::min(begin + each, rows), row_bytes);
    if (!piece.has_value()) return copy(host, "Metal takes no buffer over this memory");
    shared.pieces.push_back(*piece);
  }
  return shared;
}

namespace {

std::tuple<std::vector<Tensor>, std::string> mps_share(const Tensor& mapped) {
  Shared shared = share_mapped(mapped);
  return {shared.pieces, shared.copied};
}

}  // namespace
}  // namespace mkrs::mps

// Only where there is Metal: the schema of an op that no other build could have.
STABLE_TORCH_LIBRARY_FRAGMENT(mkrs, m) {
  m.def("mps_share(Tensor mapped) -> (Tensor[] pieces, str copied)");
}

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("mps_share", TORCH_BOX(&mkrs::mps::mps_share));
}
