// Recorded kernel calls (shim_mps.cpp writes them): names, grids, and memory before and after.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace replay {

struct Argument {
  uint64_t index = 0;
  bool pointer = false;  // false: an 8-byte value
  bool writable = false;
  uint64_t same = 0;  // position of the first argument over the same memory: often its own
  std::vector<char> before;
  std::vector<char> after;       // of a writable one
  std::vector<uint8_t> written;  // which bytes of `after` the kernel or its caller wrote
};

struct Call {
  std::string kernel;
  uint64_t grid[3] = {}, group[3] = {};  // in threads
  std::vector<Argument> arguments;
};

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) fail("cannot be opened");
  }
  ~Reader() { std::fclose(file_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  // False at the end of the file.
  bool next(Call& call) {
    uint64_t size = 0;
    if (std::fread(&size, sizeof size, 1, file_) != 1) return false;
    call.kernel.resize(size);
    read(&call.kernel[0], size);
    for (uint64_t& n : call.grid) n = number();
    for (uint64_t& n : call.group) n = number();
    call.arguments.assign(number(), Argument());
    for (Argument& a : call.arguments) {
      a.index = number();
      a.pointer = number() != 0;
      a.writable = number() != 0;
      a.same = number();
      a.before.resize(number());
      read(a.before.data(), a.before.size());
    }
    for (Argument& a : call.arguments) {
      if (!a.writable) continue;
      a.after.resize(a.before.size());
      a.written.resize(a.before.size());
      read(a.after.data(), a.after.size());
      read(a.written.data(), a.written.size());
    }
    return true;
  }

 private:
  uint64_t number() {
    uint64_t n = 0;
    read(&n, sizeof n);
    return n;
  }
  void read(void* to, size_t size) {
    if (size > 0 && std::fread(to, 1, size, file_) != size) fail("ends in the middle of a call");
  }
  [[noreturn]] static void fail(const char* what) {
    std::fprintf(stderr, "replay: the recorded file %s\n", what);
    std::exit(2);
  }
  FILE* file_;
};

// How many bytes that should have been written differ from the record.
inline size_t differing(const Argument& a, const std::vector<char>& got) {
  size_t count = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const char want = a.written[i] ? a.after[i] : a.before[i];
    count += got[i] != want;
  }
  return count;
}

}  // namespace replay
