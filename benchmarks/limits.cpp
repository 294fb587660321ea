// The limits of this machine, measured: DRAM read and copy bandwidth, f32 FMA, int8 dot product and
// bf16 dot product peaks. Prints one JSON object. Build: g++ -O3 -march=native -pthread limits.cpp
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Runs fn(thread) on `threads` threads that start together; the best wall time of `repeats`.
template <typename F>
double best_time(int threads, int repeats, const F& fn) {
  double best = 1e30;
  for (int r = 0; r < repeats; ++r) {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::vector<std::thread> pool;
    for (int t = 0; t < threads; ++t) {
      pool.emplace_back([&, t] {
        ready.fetch_add(1);
        while (!go.load()) {
        }
        fn(t);
      });
    }
    while (ready.load() < threads) {
    }
    const double start = now();
    go.store(true);
    for (std::thread& thread : pool) thread.join();
    best = std::min(best, now() - start);
  }
  return best;
}

volatile uint64_t sink;

// Sums a part of the buffer; four independent streams of adds, so that only loads can bind.
void read_part(const uint64_t* data, size_t count) {
  uint64_t a[32] = {};
  for (size_t i = 0; i + 32 <= count; i += 32) {
    // Into L2, 6 KiB ahead: without it four-kilobyte pages cost some of the bandwidth.
    for (int line = 0; line < 4; ++line) __builtin_prefetch(data + i + 768 + 8 * line, 0, 2);
    for (int j = 0; j < 32; ++j) a[j] += data[i + j];
  }
  uint64_t total = 0;
  for (uint64_t value : a) total += value;
  sink = total;
}

constexpr int kChains = 12;  // independent accumulators: latency 4 x 2 pipes and some slack

double fma_peak(int threads) {
  const long iterations = 20000000;
  double lanes = 0;
  const double seconds = best_time(threads, 5, [&](int) {
#if defined(__AVX512F__)
    __m512 acc[kChains];
    for (auto& a : acc) a = _mm512_set1_ps(1.0f);
    const __m512 b = _mm512_set1_ps(0.999f), c = _mm512_set1_ps(0.001f);
    for (long i = 0; i < iterations / kChains; ++i) {
      for (auto& a : acc) a = _mm512_fmadd_ps(a, b, c);
    }
    __m512 total = acc[0];
    for (auto& a : acc) total = _mm512_add_ps(total, a);
    sink = static_cast<uint64_t>(_mm512_reduce_add_ps(total));
#elif defined(__AVX2__)
    __m256 acc[kChains];
    for (auto& a : acc) a = _mm256_set1_ps(1.0f);
    const __m256 b = _mm256_set1_ps(0.999f), c = _mm256_set1_ps(0.001f);
    for (long i = 0; i < iterations / kChains; ++i) {
      for (auto& a : acc) a = _mm256_fmadd_ps(a, b, c);
    }
    __m256 total = acc[0];
    for (auto& a : acc) total = _mm256_add_ps(total, a);
    sink = static_cast<uint64_t>(_mm_cvtss_f32(_mm256_castps256_ps128(total)));
#elif defined(__aarch64__)
    float32x4_t acc[kChains];
    for (auto& a : acc) a = vdupq_n_f32(1.0f);
    const float32x4_t b = vdupq_n_f32(0.999f);
    for (long i = 0; i < iterations / kChains; ++i) {
      for (auto& a : acc) a = vfmaq_f32(b, a, b);
    }
    float32x4_t total = acc[0];
    for (auto& a : acc) total = vaddq_f32(total, a);
    sink = static_cast<uint64_t>(vaddvq_f32(total));
#endif
  });
#if defined(__AVX512F__)
  lanes = 16;
#elif defined(__AVX2__)
  lanes = 8;
#elif defined(__aarch64__)
  lanes = 4;
#endif
  return 2.0 * lanes * static_cast<double>(iterations / kChains * kChains) * threads / seconds;
}

double int8_peak(int threads) {
#if defined(__AVX512VNNI__)
  const long iterations = 20000000;
  const double seconds = best_time(threads, 5, [&](int) {
    __m512i acc[kChains];
    for (auto& a : acc) a = _mm512_setzero_si512();
    __m512i b = _mm512_set1_epi8(1), c = _mm512_set1_epi8(2);
    for (long i = 0; i < iterations / kChains; ++i) {
      asm volatile("" : "+v"(b), "+v"(c));
      for (auto& a : acc) a = _mm512_dpbusd_epi32(a, b, c);
    }
    __m512i total = acc[0];
    for (auto& a : acc) total = _mm512_add_epi32(total, a);
    sink = static_cast<uint64_t>(_mm512_reduce_add_epi32(total));
  });
  return 128.0 * static_cast<double>(iterations / kChains * kChains) * threads / seconds;
#else
  (void)threads;
  return 0;
#endif
}

double bf16_peak(int threads) {
#if defined(__AVX512BF16__)
  const long iterations = 20000000;
  const double seconds = best_time(threads, 5, [&](int) {
    __m512 acc[kChains];
    for (auto& a : acc) a = _mm512_setzero_ps();
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512i b = (__m512i)_mm512_cvtne2ps_pbh(one, one);
    for (long i = 0; i < iterations / kChains; ++i) {
      asm volatile("" : "+v"(b));
      for (auto& a : acc) a = _mm512_dpbf16_ps(a, (__m512bh)b, (__m512bh)b);
    }
    __m512 total = acc[0];
    for (auto& a : acc) total = _mm512_add_ps(total, a);
    sink = static_cast<uint64_t>(_mm512_reduce_add_ps(total));
  });
  return 64.0 * static_cast<double>(iterations / kChains * kChains) * threads / seconds;
#else
  (void)threads;
  return 0;
#endif
}

}  // namespace

// For `reader` of limits.py, which builds this as a library: threads stay between calls, as those of
// the kernels do.
extern "C" void read_alone(const void* data, size_t bytes, int threads) {
  const size_t part = bytes / 8 / threads;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int t = 0; t < threads; ++t) {
    read_part(static_cast<const uint64_t*>(data) + part * t, part);
  }
}

int main(int argc, char** argv) {
  const int max_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const size_t bytes = size_t{512} << 20;  // far past any last-level cache
  uint64_t* data = static_cast<uint64_t*>(std::aligned_alloc(size_t{2} << 20, bytes));
  uint64_t* copy = static_cast<uint64_t*>(std::aligned_alloc(size_t{2} << 20, bytes));
  if (data == nullptr || copy == nullptr) return 1;
  std::memset(data, 1, bytes);
  std::memset(copy, 1, bytes);
  std::printf("{");
  for (int threads = 1; threads <= max_threads; threads = threads == 1 ? max_threads : threads + 1) {
    const size_t part = bytes / 8 / threads;
    const double read =
        best_time(threads, 7, [&](int t) { read_part(data + part * t, part); });
    const double copied = best_time(
        threads, 5, [&](int t) { std::memcpy(copy + part * t, data + part * t, part * 8); });
    std::printf(
        "%s\"%d\": {\"read_gbps\": %.2f, \"copy_gbps\": %.2f, \"f32_gflops\": %.1f, "
        "\"int8_gops\": %.1f, \"bf16_gflops\": %.1f}",
        threads == 1 ? "" : ", ", threads, bytes / read / 1e9, 2 * bytes / copied / 1e9,
        fma_peak(threads) / 1e9, int8_peak(threads) / 1e9, bf16_peak(threads) / 1e9);
    if (max_threads == 1) break;
  }
  std::printf("}\n");
  return 0;
}
