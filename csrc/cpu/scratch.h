// Scratch memory of one call: reused by the next call of the same thread while it is small.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace mkrs::cpu {

class Scratch {
 public:
  // At least `bytes` bytes, 64-byte aligned, valid until this object dies. Not reentrant: one live
  // Scratch per thread.
  explicit Scratch(int64_t bytes) {
    if (bytes <= kKept) {
      static thread_local Block kept;
      if (bytes > 0 && kept == nullptr) kept = allocate(kKept);
      data_ = kept.get();
    } else {
      own_ = allocate(bytes);
      data_ = own_.get();
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Block = std::unique_ptr<void, Free>;
  static constexpr int64_t kKept = int64_t{1} << 18;  // bytes a thread keeps between calls

  static Block allocate(int64_t bytes) {
    void* p = std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    return Block(p);
  }

  Block own_;
  void* data_ = nullptr;
};

}  // namespace mkrs::cpu
