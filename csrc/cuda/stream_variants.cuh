// The variants of stream_kernel.cuh and their shared memory, for the kernel and for the plan.
#pragma once

#include "stream.cuh"

namespace mkrs::cuda {

template <int RUN>
constexpr int kStreamRuns = kStreamUnit / (16 * RUN);  // of a unit

// (scale, shift) of 16 rows of a unit; the pitch avoids bank conflicts of the reads below.
template <int RUN, int COLS>
constexpr int kStreamPairPitch = kStreamRuns<RUN> * 8 + (COLS == 1 ? 0 : 16);
template <int RUN, int COLS>
constexpr int kStreamPairBytes = kStreamTile * kStreamPairPitch<RUN, COLS>;

constexpr int kStreamZeroBytes = kStreamUnit * 2 + 128;  // what unused columns read

template <int BITS>
constexpr int kStreamUnitBytes = BITS / 2 * kStreamBoxBytes;  // of codes

// Byte offsets into shared memory; host and kernel agree through this one function.
struct StreamLayout {
  int raw, x, zeros, sums, pairs, totals, total;
};

template <int BITS, int RUN, int COLS, int WARPS>
__host__ __device__ __forceinline__ StreamLayout stream_layout(const StreamParams& p) {
  StreamLayout l;
  l.raw = WARPS * p.stages * kStreamUnitBytes<BITS>;
  l.x = l.raw + WARPS * p.stages * 32 * p.raw_bytes;
  l.zeros = l.x + (p.m * p.x_row * 2 + 127) / 128 * 128;
  l.sums = l.zeros + kStreamZeroBytes;
  l.pairs = l.sums + p.split_chunks * kStreamRuns<RUN> * COLS * 4;
  l.totals = l.pairs + WARPS * kStreamPairBytes<RUN, COLS>;
  l.total = l.totals + p.total_tiles * p.m * kStreamTile * 4;
  return l;
}

// What a number of input rows runs as. Small groups take fewer variants.
constexpr int stream_columns(int m, int run) {
  return m > 8 ? 16 : run < 4 || m > 4 ? 8 : m > 1 ? 4 : 1;
}
// As many warps as leave room for the activations of usual layers.
constexpr int stream_warps(int bits, int run, int columns) {
  return run < 4 ? 8 : bits == 8 || columns >= 8 ? 10 : 12;
}
// With few warps the next kernel's block fits beside this one's and gets ready while it works. That
// pays where a launch is short, and at 8 bits; else more warps do.
constexpr int kStreamLightWarps = 8;
constexpr bool stream_is_light(int columns, int warps) {
  return columns == 1 && warps == kStreamLightWarps;
}

template <int BITS, int RUN, int COLS, int WARPS = stream_warps(BITS, RUN, COLS)>
struct StreamVariant {
  static constexpr int kRun = RUN;
  static constexpr int kColumns = COLS;
  static constexpr int kWarps = WARPS;
};

// Calls f with the StreamVariant of a call.
template <int BITS, typename F>
void dispatch_stream(int run, int m, bool light, const F& f) {
  const int columns = stream_columns(m, run);
  if (run == 4) {
    if (columns == 1) {
      if constexpr (BITS < 8) {
        if (!light) return f(StreamVariant<BITS, 4, 1>{});
      }
      f(StreamVariant<BITS, 4, 1, kStreamLightWarps>{});
    } else if (columns == 4) {
      f(StreamVariant<BITS, 4, 4>{});
    } else if (columns == 16) {
      if constexpr (BITS < 8) f(StreamVariant<BITS, 4, 16>{});
    } else {
      f(StreamVariant<BITS, 4, 8>{});
    }
  } else if (run == 2) {
    f(StreamVariant<BITS, 2, 8>{});
  } else {
    f(StreamVariant<BITS, 1, 8>{});
  }
}

}  // namespace mkrs::cuda
