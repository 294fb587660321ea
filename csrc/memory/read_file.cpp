// Parallel reads of a file into memory.
//
// Floor: the system's copy out of the page cache (or the disk), and one fault for every huge page
// of fresh memory. A memory map costs a fault for every few 4 KiB pages instead, which is why
// reading this way takes about a third of the processor time.
#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "checks.h"
#include "memory/helpers.h"
#include "memory/pages.h"

namespace mkrs::memory {
namespace {

// One pread() call. Pieces end at multiples of a huge page of the memory they fill: of two threads
// that touch the same fresh one, both clear a page and one of them in vain.
constexpr int64_t kPieceBytes = 2 << 20;

struct Rows {
  int fd;
  char* out;
  int64_t offset;      // of the first row in the file
  int64_t row_bytes;   // read from every row
  int64_t row_stride;  // between rows in the file
};

// Error number (0: the file ended) and position of the first read that failed.
struct Failure {
  int64_t error;
  int64_t position;
};

// False and a Failure if not all bytes are there.
bool read_at(int fd, char* out, int64_t position, int64_t bytes, Failure* failure) {
  while (bytes > 0) {
    const ssize_t count = pread(fd, out, std::min<int64_t>(bytes, kPieceBytes), position);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      *failure = {count < 0 ? errno : 0, position};
      return false;
    }
    out += count;
    position += count;
    bytes -= count;
  }
  return true;
}

// Reads `rows` pieces of row_bytes that lie row_stride apart; `out` holds them one after the other.
// Returns {-1, 0} when everything was read, else {errno or 0 at the end of the file, position}.
std::tuple<int64_t, int64_t> read_file(Tensor out, int64_t fd, int64_t offset, int64_t row_bytes,
                                       int64_t row_stride, int64_t rows, int64_t threads) {
  const char* op = "read_file";
  MKRS_CHECK(out.scalar_type() == ScalarType::Byte && out.is_contiguous(), op,
             "out must be contiguous uint8, got another layout or dtype");
  int64_t total = 0;
  MKRS_CHECK(offset >= 0 && row_bytes >= 0 && row_stride >= row_bytes && rows >= 0 &&
                 !__builtin_mul_overflow(row_bytes, rows, &total) && total == out.numel(),
             op, "out must have row_bytes * rows elements, got ", out.numel(), " for ", row_bytes,
             " * ", rows, " at ", offset, " with stride ", row_stride);
  if (total == 0) return {-1, 0};
  Rows r{static_cast<int>(fd), static_cast<char*>(out.mutable_data_ptr()), offset, row_bytes,
         row_stride};
  if (row_stride == row_bytes || rows == 1) {
    r.row_bytes = r.row_stride = total;
    rows = 1;
  }
  // Work is cut into pieces of whole rows, or of parts of one long row.
  const int64_t rows_per_piece = std::max<int64_t>(1, kPieceBytes / r.row_bytes);
  const int64_t pieces_per_row = rows_per_piece > 1 ? 1 : (r.row_bytes - 1) / kPieceBytes + 2;
  const int64_t pieces = (rows + rows_per_piece - 1) / rows_per_piece * pieces_per_row;

  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  Failure first{-1, 0};
  const auto work = [&] {
    for (int64_t piece = next++; piece < pieces && !failed; piece = next++) {
      Failure failure{0, 0};
      bool ok = true;
      if (pieces_per_row > 1) {
        const int64_t row = piece / pieces_per_row;
        char* out = r.out + row * r.row_bytes;
        const int64_t place = piece % pieces_per_row * kPieceBytes -
                              static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % kPieceBytes);
        const int64_t begin = std::max<int64_t>(0, place);
        const int64_t end = std::min(r.row_bytes, place + kPieceBytes);
        if (begin < end) {
          ok = read_at(r.fd, out + begin, r.offset + row * r.row_stride + begin, end - begin,
                       &failure);
        }
      } else {
        const int64_t begin = piece * rows_per_piece;
        const int64_t end = std::min(rows, begin + rows_per_piece);
        for (int64_t row = begin; ok && row < end; ++row) {
          ok = read_at(r.fd, r.out + row * r.row_bytes, r.offset + row * r.row_stride, r.row_bytes,
                       &failure);
        }
      }
      if (!ok && !failed.exchange(true)) first = failure;
    }
  };
  Helpers::shared().run(std::min(threads, pieces) - 1, work);
  return {first.error, first.position};
}

bool map_resident_pages(Tensor view) {
  MKRS_CHECK(view.scalar_type() == ScalarType::Byte && view.is_contiguous(), "map_resident_pages",
             "the view must be contiguous uint8, got another");
  return map_resident(static_cast<char*>(view.mutable_data_ptr()), view.numel());
}

}  // namespace
}  // namespace mkrs::memory

STABLE_TORCH_LIBRARY_IMPL(mkrs, CPU, m) {
  m.impl("_read_file", TORCH_BOX(&mkrs::memory::read_file));
  m.impl("_map_resident_pages", TORCH_BOX(&mkrs::memory::map_resident_pages));
}
