// Translating the addresses of weights before they are needed.
#pragma once

#include <algorithm>
#include <cstdint>

#include "format.h"

namespace mkrs::cpu {

// Touches the pages of a weight's rows a good way ahead of the kernel that walks through them.
//
// A prefetch does not wait for memory, but for the translation of its address, and it retires in
// order: in pages of 4 KiB, whose entries a nested page walk finds in memory, a decode kernel stood
// still once a page (14 GB/s on a Zen 4 core that reads 24). Touching the pages of 128 KiB in one
// go lets their walks overlap (22 GB/s). With huge pages this costs next to nothing.
class PageTouch {
 public:
  // For rows [begin, end), in ascending order.
  PageTouch(const QuantizedWeight& w, int64_t begin, int64_t end)
      : w_(w),
        end_(end),
        run_(std::max<int64_t>(1, kRunBytes / std::max<int64_t>(1, w.codes_stride))),
        touched_(begin) {
    touch_run();
  }

  // Call before work on `row`: its pages and those of the next rows are touched after it.
  void reach(int64_t row) {
    while (touched_ < end_ && touched_ - run_ <= row) touch_run();
  }

 private:
  static constexpr int64_t kPage = 4096;
  static constexpr int64_t kRunBytes = 32 * kPage;

  void touch_run() {
    const int64_t last = std::min(end_, touched_ + run_);
    const int64_t scale_size = float_size(w_.scale_type);
    touch(w_.codes, w_.codes_stride, code_bytes(w_.in_features, w_.bits), last);
    touch(w_.scale, w_.scale_stride * scale_size, w_.groups * scale_size, last);
    if (w_.scheme != Scheme::Symmetric) {
      const int64_t size = w_.scheme == Scheme::Affine ? scale_size : 1;
      touch(w_.zero, w_.zero_stride * size, w_.groups * size, last);
    }
    touched_ = last;
  }

  void touch(const void* data, int64_t stride, int64_t row_bytes, int64_t last) const {
    const int64_t step = std::max<int64_t>(1, kPage / std::max<int64_t>(1, stride));
    for (int64_t row = touched_; row < last; row += step) {
      const char* p = static_cast<const char*>(data) + row * stride;
      for (int64_t i = 0; i < row_bytes; i += kPage) {
        __builtin_prefetch(p + i, 0, 2);
        // GCC drops calls of functions that do nothing but prefetch.
        asm volatile("");
      }
    }
  }

  const QuantizedWeight& w_;
  int64_t end_, run_, touched_;
};

}  // namespace mkrs::cpu
