// Objects that Python names by a number. A number that was never given or is already taken back is
// an error, never a wild pointer.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "checks.h"

namespace mkrs::memory {

template <typename T>
class Handles {
 public:
  explicit Handles(const char* what) : what_(what) {}

  int64_t add(std::shared_ptr<T> object) {
    std::lock_guard<std::mutex> lock(mutex_);
    objects_.emplace(++last_, std::move(object));
    return last_;
  }

  std::shared_ptr<T> get(const char* op, int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    MKRS_CHECK(found != objects_.end(), op, what_, " must be open, got handle ", handle);
    return found->second;
  }

  // The object, or nothing if it was taken before.
  std::shared_ptr<T> take(int64_t handle) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = objects_.find(handle);
    if (found == objects_.end()) return nullptr;
    std::shared_ptr<T> object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

 private:
  const char* what_;
  std::mutex mutex_;
  int64_t last_ = 0;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_;
};

}  // namespace mkrs::memory
