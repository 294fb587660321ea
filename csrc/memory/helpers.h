// Threads that sleep until a read wants help. Starting one for each read of a few MiB costs more
// processor time than anything else beside the read itself.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

namespace mkrs::memory {

class Helpers {
 public:
  // Those of this process. A forked child has none of its parent's threads and starts anew. Leaked:
  // the threads sleep on until the process ends.
  static Helpers& shared() {
    static std::atomic<Helpers*> helpers{new Helpers};
    static const int registered =
        pthread_atfork(nullptr, nullptr, [] { helpers.store(new Helpers); });
    (void)registered;
    return *helpers.load();
  }

  // Runs `work` here and at the same time in up to `count` other threads; returns when none is at
  // it any more. `work` must not throw, and must be complete when it has returned once.
  void run(int64_t count, const std::function<void()>& work) {
    Job job{&work, count, 0};
    if (count > 0) offer(&job);
    work();
    std::unique_lock<std::mutex> lock(mutex_);
    if (job.wanted > 0) {  // whoever has not come yet need not come any more
      jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
      wanted_ -= job.wanted;
    }
    left_.wait(lock, [&] { return job.running == 0; });
  }

 private:
  static constexpr int64_t kMostThreads = 16;

  struct Job {
    const std::function<void()>* work;
    int64_t wanted;   // threads that may still join
    int64_t running;  // threads at it
  };

  Helpers() = default;

  void offer(Job* job) {
    const int64_t count = job->wanted;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      jobs_.push_back(job);
      wanted_ += job->wanted;
      for (; idle_ < wanted_ && threads_ < kMostThreads; ++threads_, ++idle_) {
        try {
          std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
          break;  // no more to be had: those that are there do the work
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) offered_.notify_one();
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      offered_.wait(lock, [&] { return !jobs_.empty(); });
      Job* job = jobs_.front();
      if (--job->wanted == 0) jobs_.pop_front();
      --wanted_;
      --idle_;
      ++job->running;
      lock.unlock();
      (*job->work)();
      lock.lock();
      ++idle_;
      if (--job->running == 0) left_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable offered_, left_;
  std::deque<Job*> jobs_;  // that more threads may join
  int64_t wanted_ = 0;     // of all jobs together
  int64_t threads_ = 0, idle_ = 0;
};

}  // namespace mkrs::memory
