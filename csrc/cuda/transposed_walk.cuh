// How a warp of transposed.cu walks down the rows of a block: where its lanes are, the ring of
// codes and scales it keeps filled, and codes of two rows as operands.
#pragma once

#include "mma.cuh"
#include "rounded.cuh"
#include "transposed.cuh"

namespace mkrs::cuda {

// Where a lane is: its columns and the rows of its block.
struct TransposedPlace {
  int warp, lane, g, t;
  int64_t k;  // the first of the lane's eight columns
  int64_t group;
  int begin, end;  // rows
};

template <int BITS>
__device__ __forceinline__ TransposedPlace transposed_place(const TransposedParams& p) {
  TransposedPlace at;
  at.warp = threadIdx.x / 32;
  at.lane = threadIdx.x % 32;
  at.g = at.lane / 4;
  at.t = at.lane % 4;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x) * kTransposedWarps + at.warp) * kTransposedSpan;
  at.k = first + at.g * 8;
  at.group = first >> p.shift;
  at.begin = blockIdx.y * p.split_rows;
  at.end = static_cast<int>(min(p.w.rows, static_cast<int64_t>(at.begin) + p.split_rows));
  return at;
}

// The codes of a step lie in a slot of the warp's ring, 32 rows of BITS / 2 pieces of 16 bytes.
// Every eight rows are followed by padding, since lanes of different t read rows eight apart.
template <int BITS>
constexpr int kTransposedRowBytes = kTransposedSpan * BITS / 8;
template <int BITS>
constexpr int kTransposedPadding = BITS == 2 ? 16 : 32;
template <int BITS>
constexpr int kTransposedSlotBytes =
    kTransposedStep * kTransposedRowBytes<BITS> + 4 * kTransposedPadding<BITS>;
constexpr int kTransposedStages = 4;

// Down the rows of a block, a step after the other: codes by asynchronous copies into the ring,
// whose waits are in order, and scale and zero of one row a lane, its own, into registers.
template <int BITS>
class TransposedWalk {
 public:
  __device__ __forceinline__ TransposedWalk(const TransposedParams& p, const TransposedPlace& at,
                                            uint32_t ring)
      : p_(p), at_(at), ring_(ring) {
    const QuantizedWeight& w = p.w;
    wide_ = w.scale_type == Float::F32;
    zero_bytes_ = w.scheme == Scheme::Symmetric    ? 0
                  : w.scheme == Scheme::Asymmetric ? 1
                  : wide_                          ? 4
                                                   : 2;
    const int scale_bytes = wide_ ? 4 : 2;
    const int64_t row = at.begin + at.lane;
    scale_ = static_cast<const char*>(w.scale) + (row * w.scale_stride + at.group) * scale_bytes;
    zero_ = static_cast<const char*>(w.zero) + (row * w.zero_stride + at.group) * zero_bytes_;
    scale_step_ = kTransposedStep * w.scale_stride * scale_bytes;
    zero_step_ = kTransposedStep * w.zero_stride * zero_bytes_;
    row_ = at.begin + at.lane / kPieces;
    const int64_t byte = (at.k - at.g * 8) * BITS / 8 + at.lane % kPieces * 16;
    codes_ = w.codes + row_ * w.codes_stride + byte;
    const int64_t left = (w.in_features * BITS + 7) / 8 - byte;
    valid_ = left >= 16 ? 16 : left > 0 ? static_cast<int>(left) : 0;
    if (valid_ == 0) codes_ -= byte;  // nothing is read, but from a legal address
  }

  // Copies of the next step; without it past the end.
  __device__ __forceinline__ void ask() {
    if (row_ - at_.lane / kPieces < at_.end) {
      const uint8_t* from = codes_;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int row = at_.lane / kPieces + i * (32 / kPieces);
        const uint32_t to = ring_ + slot_ * kTransposedSlotBytes<BITS> +
                            row * kTransposedRowBytes<BITS> + row / 8 * kTransposedPadding<BITS> +
                            at_.lane % kPieces * 16;
        // Rows past the end become zeros, and so does what multiplies them.
        const bool inside = row_ + i * (32 / kPieces) < at_.end;
        copy_async(to, reinterpret_cast<const char*>(inside ? from : codes_base()), 16,
                   inside ? valid_ : 0);
        from += 32 / kPieces * p_.w.codes_stride;
      }
    }
    codes_ += kTransposedStep * p_.w.codes_stride;
    row_ += kTransposedStep;
    slot_ = (slot_ + 1) % kTransposedStages;
  }

  // The next step's, in order too.
  __device__ __forceinline__ RawGroup load_group_of(int row) {
    RawGroup group{0, 0};
    if (row + at_.lane < at_.end) {
      group.scale = wide_ ? __ldg(reinterpret_cast<const uint32_t*>(scale_))
                          : __ldg(reinterpret_cast<const unsigned short*>(scale_));
      if (zero_bytes_ == 2) {
        group.zero = __ldg(reinterpret_cast<const unsigned short*>(zero_));
      } else if (zero_bytes_ == 1) {
        group.zero = __ldg(reinterpret_cast<const uint8_t*>(zero_));
      } else if (zero_bytes_ == 4) {
        group.zero = __ldg(reinterpret_cast<const uint32_t*>(zero_));
      }
    }
    scale_ += scale_step_;
    zero_ += zero_step_;
    return group;
  }

  // The lane's columns of rows 8t to 8t + 7 of the oldest step; it is complete.
  __device__ __forceinline__ void read(const unsigned char* ring, EightCodes<BITS> (&rows)[8]) {
    const unsigned char* from =
        ring + read_slot_ * kTransposedSlotBytes<BITS> +
        at_.t * (8 * kTransposedRowBytes<BITS> + kTransposedPadding<BITS>)+at_.g * BITS;
#pragma unroll
    for (int i = 0; i < 8; ++i) rows[i].read(from + i * kTransposedRowBytes<BITS>);
    read_slot_ = (read_slot_ + 1) % kTransposedStages;
  }

 private:
  static constexpr int kPieces = BITS / 2;  // of 16 bytes, of a row, and of a lane

  __device__ __forceinline__ const uint8_t* codes_base() const { return p_.w.codes; }

  const TransposedParams& p_;
  const TransposedPlace& at_;
  const uint8_t* codes_;
  const char* scale_;
  const char* zero_;
  int64_t scale_step_, zero_step_;
  uint32_t ring_;
  int row_;  // of the lane's first piece of the next step
  int slot_ = 0;
  int read_slot_ = 0;
  int valid_;
  int zero_bytes_;
  bool wide_;
};

// Codes at bit SHIFT of both halves of a word as integers in bf16. Not q - c: where a zero term
// cancels scale * q, the errors of scale * c would be larger than what is left.
template <int BITS, int SHIFT>
__device__ __forceinline__ uint32_t code_pair(uint32_t v) {
  using T = __nv_bfloat16;
  constexpr uint32_t kMask = ((1u << BITS) - 1 << SHIFT) * 0x10001u;
  if constexpr (BITS ==
                8) {  // 128 + the low seven bits, minus 0 or 128 as the top bit is set or not
    return sub2<T>(masked_or(v, 0x007f007fu, 0x43004300u),
                   sub2<T>(0x43804380u, masked_or(v, 0x00800080u, 0x43004300u)));
  } else if constexpr (SHIFT == 0) {
    return sub2<T>(masked_or(v, kMask, 0x43004300u), 0x43004300u);
  } else {
    static_assert(BITS == 2 && (SHIFT == 2 || SHIFT == 4));
    constexpr uint32_t kFactor = SHIFT == 2 ? 0x3e803e80u : 0x3d803d80u;  // 1/4, 1/16
    constexpr uint32_t kOffset = SHIFT == 2 ? 0xc200c200u : 0xc100c100u;  // -32, -8
    return fma2<T>(masked_or(v, kMask, 0x43004300u), kFactor, kOffset);
  }
}

// Codes of the same column in two rows as such pairs.
template <int BITS>
__device__ __forceinline__ void pair_rows(const EightCodes<BITS>& low, const EightCodes<BITS>& high,
                                          uint32_t (&pairs)[8]) {
  if constexpr (BITS == 8) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t v = __byte_perm(low.words[i / 2], high.words[i / 2], i % 2 ? 0x7632 : 0x5410);
      pairs[2 * i] = code_pair<8, 0>(v);
      pairs[2 * i + 1] = code_pair<8, 0>(v >> 8);
    }
  } else if constexpr (BITS == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t v = __byte_perm(low.words[0], high.words[0], i % 2 ? 0x7632 : 0x5410);
      pairs[4 * i] = code_pair<4, 0>(v);
      pairs[4 * i + 1] = code_pair<4, 0>(v >> 4);
      pairs[4 * i + 2] = code_pair<4, 0>(v >> 8);
      pairs[4 * i + 3] = code_pair<4, 0>(v >> 12);
    }
  } else {
    const uint32_t v = __byte_perm(low.words[0], high.words[0], 0x5410);
    pairs[0] = code_pair<2, 0>(v);
    pairs[1] = code_pair<2, 2>(v);
    pairs[2] = code_pair<2, 4>(v);
    pairs[3] = code_pair<2, 0>(v >> 6);
    pairs[4] = code_pair<2, 2>(v >> 6);
    pairs[5] = code_pair<2, 4>(v >> 6);
    pairs[6] = code_pair<2, 0>(v >> 12);
    pairs[7] = code_pair<2, 2>(v >> 12);
  }
}

}  // namespace mkrs::cuda
