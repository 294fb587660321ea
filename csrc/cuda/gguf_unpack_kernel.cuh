// The kernel of gguf_unpack: needs no torch, and the tests also run it on the CPU.
//
// Floor: the bytes read plus the bytes written over the memory bandwidth, e.g. 0.5625 + 0.75 bytes
// a weight for Q4_K. Blocks have 18, 34, 210 ... bytes, so neighbouring threads would read bytes
// far apart: a tile of them goes through shared memory in 16-byte loads, and each thread then makes
// 16 adjacent bytes of codes, from words of four values.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "gguf_layouts.h"

namespace mkrs::cuda::gguf_unpacking {

constexpr int kThreads = 256;
constexpr int kChunksEach = 4;  // 16-byte chunks of codes that a thread makes of a full tile
template <typename Type>
constexpr int kTileBlocks = kThreads * kChunksEach * 16 / Type::layout.codes();
constexpr uint32_t kLowNibbles = 0x0f0f0f0f;
constexpr uint32_t kLowCrumbs = 0x03030303;
constexpr uint32_t kLowBits = 0x01010101;

__device__ __forceinline__ uint32_t load16(const uint8_t* p) {
  return *reinterpret_cast<const uint16_t*>(p);
}

__device__ __forceinline__ float load_half(const uint8_t* p) {
  return __half2float(*reinterpret_cast<const __half*>(p));
}

// Four bytes of a staged block. Tiles are aligned, all blocks and fields begin at even bytes, and
// in blocks of whole words at multiples of four.
template <typename Type>
__device__ __forceinline__ uint32_t load32(const uint8_t* p) {
  if constexpr (Type::layout.bytes % 4 == 0) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else {
    return load16(p) | load16(p + 2) << 16;
  }
}

// One struct per GGUF type. values() gives the codes of elements e to e + 3 (e a multiple of four),
// a byte each; scale() and offset() are those of group g of the block.

// Types of 32 weights: an f16 scale, with affine ones an f16 offset behind it.
struct Halves {
  using Scale = uint16_t;  // the bits
  static __device__ Scale scale(const uint8_t* b, int) { return load16(b); }
  static __device__ Scale offset(const uint8_t* b, int) { return load16(b + 2); }
};

// 16 bytes hold elements 0..15 in their low nibbles and 16..31 in their high ones.
template <typename Type>
__device__ __forceinline__ uint32_t halved_nibbles(const uint8_t* qs, int e) {
  return load32<Type>(qs + e % 16) >> (e / 16 * 4) & kLowNibbles;
}

// Bits e to e + 3 of the four bytes at qh, as bit 4 of a byte each.
template <typename Type>
__device__ __forceinline__ uint32_t fifth_bits(const uint8_t* qh, int e) {
  const uint32_t bits = load32<Type>(qh) >> e & 15;
  return (bits * 0x00204081 & kLowBits) << 4;  // the product moves bit i to bit 8 * i
}

struct Q4_0 : Halves {
  static constexpr gguf::Layout layout = gguf::Q4_0;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    return halved_nibbles<Q4_0>(b + 2, e);
  }
};

struct Q4_1 : Halves {
  static constexpr gguf::Layout layout = gguf::Q4_1;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    return halved_nibbles<Q4_1>(b + 4, e);
  }
};

struct Q5_0 : Halves {
  static constexpr gguf::Layout layout = gguf::Q5_0;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    return (halved_nibbles<Q5_0>(b + 6, e) | fifth_bits<Q5_0>(b + 2, e)) + (128 - 16) * kLowBits;
  }
};

struct Q5_1 : Halves {
  static constexpr gguf::Layout layout = gguf::Q5_1;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    return halved_nibbles<Q5_1>(b + 8, e) | fifth_bits<Q5_1>(b + 4, e);
  }
};

struct Q8_0 : Halves {
  static constexpr gguf::Layout layout = gguf::Q8_0;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    return load32<Q8_0>(b + 2 + e) ^ 0x80808080;  // int8 q to q + 128
  }
};

// 64 bytes hold 256 two-bit values: element 128h + 32k + l at bits 2k of byte 32h + l.
template <typename Type>
__device__ __forceinline__ uint32_t crumbs(const uint8_t* qs, int e) {
  return load32<Type>(qs + e / 128 * 32 + e % 32) >> (e % 128 / 32 * 2) & kLowCrumbs;
}

struct Q2_K {
  static constexpr gguf::Layout layout = gguf::Q2_K;
  using Scale = float;
  static __device__ uint32_t values(const uint8_t* b, int e) { return crumbs<Q2_K>(b + 16, e); }
  static __device__ Scale scale(const uint8_t* b, int g) {
    return load_half(b + 80) * static_cast<float>(b[g] & 15);
  }
  static __device__ Scale offset(const uint8_t* b, int g) {
    return -(load_half(b + 82) * static_cast<float>(b[g] >> 4));
  }
};

struct Q3_K {
  static constexpr gguf::Layout layout = gguf::Q3_K;
  using Scale = float;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    // q = low - (high ? 0 : 4), so the code q + 8 is low + 4 + 4 * high.
    const uint32_t high = load32<Q3_K>(b + e % 32) >> (e / 32) & kLowBits;
    return crumbs<Q3_K>(b + 32, e) + 4 * (high + kLowBits);
  }
  static __device__ Scale scale(const uint8_t* b, int g) {
    const int low = g < 8 ? b[96 + g] & 15 : b[88 + g] >> 4;
    const int high = b[104 + g % 4] >> (g / 4 * 2) & 3;
    return load_half(b + 108) * static_cast<float>((low | high << 4) - 32);
  }
};

// Q4_K and Q5_K: 32 bytes hold 64 elements, the first 32 in their low nibbles; 6-bit scales and
// mins are packed into 12 bytes.
template <typename Type>
struct SuperBlock {
  using Scale = float;
  static __device__ uint32_t nibbles(const uint8_t* qs, int e) {
    return load32<Type>(qs + e / 64 * 32 + e % 32) >> (e % 64 / 32 * 4) & kLowNibbles;
  }
  static __device__ Scale scale(const uint8_t* b, int g) {
    const uint8_t* s = b + 4;
    const int v = g < 4 ? s[g] & 63 : (s[4 + g] & 15) | s[g - 4] >> 6 << 4;
    return load_half(b) * static_cast<float>(v);
  }
  static __device__ Scale offset(const uint8_t* b, int g) {
    const uint8_t* s = b + 4;
    const int v = g < 4 ? s[4 + g] & 63 : s[4 + g] >> 4 | s[g] >> 6 << 4;
    return -(load_half(b + 2) * static_cast<float>(v));
  }
};

struct Q4_K : SuperBlock<Q4_K> {
  static constexpr gguf::Layout layout = gguf::Q4_K;
  static __device__ uint32_t values(const uint8_t* b, int e) { return nibbles(b + 16, e); }
};

struct Q5_K : SuperBlock<Q5_K> {
  static constexpr gguf::Layout layout = gguf::Q5_K;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    const uint32_t high = load32<Q5_K>(b + 16 + e % 32) >> (e / 32) & kLowBits;
    return nibbles(b + 48, e) | high << 4;
  }
};

struct Q6_K {
  static constexpr gguf::Layout layout = gguf::Q6_K;
  using Scale = float;
  static __device__ uint32_t values(const uint8_t* b, int e) {
    // 64 bytes of low nibbles serve 128 elements, 32 bytes of high crumbs the same 128.
    const uint32_t low = load32<Q6_K>(b + e / 128 * 64 + e % 64) >> (e % 128 / 64 * 4);
    const uint32_t high = crumbs<Q6_K>(b + 128, e);
    return ((low & kLowNibbles) | high << 4) + (128 - 32) * kLowBits;
  }
  static __device__ Scale scale(const uint8_t* b, int g) {
    return load_half(b + 208) * static_cast<float>(static_cast<int8_t>(b[192 + g]));
  }
};

using AllTypes = gguf::Types<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K>;

// The word of packed codes that begins with element e.
template <typename Type>
__device__ __forceinline__ uint32_t code_word(const uint8_t* b, int e) {
  if constexpr (Type::layout.bits == 8) {
    return Type::values(b, e);
  } else if constexpr (Type::layout.bits == 4) {
    uint32_t v[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      v[i] = Type::values(b, e + 4 * i);
      v[i] |= v[i] >> 4;  // bytes 0 and 2: a pair of neighbours each
    }
    return __byte_perm(v[0], v[1], 0x6420);
  } else {
    uint32_t v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = Type::values(b, e + 4 * i);
      v[i] |= v[i] >> 6;   // bytes 0 and 2: a pair each
      v[i] |= v[i] >> 12;  // byte 0: both pairs
    }
    return __byte_perm(__byte_perm(v[0], v[1], 0x0040), __byte_perm(v[2], v[3], 0x0040), 0x5410);
  }
}

template <typename Vector>
__device__ __forceinline__ void stage(uint8_t* shared, const uint8_t* source, int bytes) {
  const int vectors = bytes / static_cast<int>(sizeof(Vector));
  const auto* from = reinterpret_cast<const Vector*>(source);
#pragma unroll 4
  for (int i = threadIdx.x; i < vectors; i += kThreads) {
    reinterpret_cast<Vector*>(shared)[i] = __ldg(from + i);
  }
  for (int i = vectors * sizeof(Vector) + threadIdx.x; i < bytes; i += kThreads) {
    shared[i] = source[i];
  }
}

// Where blocks lie: `rows` rows of `row_blocks` blocks, `row_stride` bytes apart.
struct Rows {
  int64_t rows, row_blocks, row_stride;
};

// Adjacent rows are one long row.
inline Rows joined(const Rows& r, int64_t block_bytes) {
  const bool adjacent = r.rows == 1 || r.row_stride == r.row_blocks * block_bytes;
  return adjacent ? Rows{1, r.rows * r.row_blocks, 0} : r;
}

// One block of threads a tile, gridDim.x tiles a row, rows gridDim.y apart. Outputs are contiguous.
// Six blocks a multiprocessor: their loads in flight are twice what its share of the bandwidth asks
// for.
template <typename Type>
__global__ void __launch_bounds__(kThreads, 6)
    unpack_kernel(const uint8_t* blocks, Rows in, uint4* codes, typename Type::Scale* scale,
                  typename Type::Scale* zero) {
  constexpr int kBytes = Type::layout.bytes;
  constexpr int kBits = Type::layout.bits;
  constexpr int kGroups = Type::layout.groups();
  constexpr int kChunks = Type::layout.codes() / 16;  // of a block
  constexpr int kTile = kTileBlocks<Type>;
  __shared__ __align__(16) uint8_t tile[kTile * kBytes];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTile;
  const int count = static_cast<int>(min(static_cast<int64_t>(kTile), in.row_blocks - first));
  for (int64_t row = blockIdx.y; row < in.rows; row += gridDim.y) {
    const uint8_t* source = blocks + row * in.row_stride + first * kBytes;
    const auto address = reinterpret_cast<uintptr_t>(source);
    if (address % 16 == 0) {
      stage<uint4>(tile, source, count * kBytes);
    } else if (address % 4 == 0) {
      stage<uint32_t>(tile, source, count * kBytes);
    } else {
      stage<uint8_t>(tile, source, count * kBytes);
    }
    __syncthreads();
    const int64_t target = row * in.row_blocks + first;
#pragma unroll 1
    for (int chunk = threadIdx.x; chunk < count * kChunks; chunk += kThreads) {
      const uint8_t* b = tile + chunk / kChunks * kBytes;
      const int e = chunk % kChunks * (128 / kBits);
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = code_word<Type>(b, e + i * (32 / kBits));
      codes[target * kChunks + chunk] = make_uint4(words[0], words[1], words[2], words[3]);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < count * kGroups; i += kThreads) {
      const uint8_t* b = tile + i / kGroups * kBytes;
      scale[target * kGroups + i] = Type::scale(b, i % kGroups);
      if constexpr (Type::layout.scheme == Scheme::Affine) {
        zero[target * kGroups + i] = Type::offset(b, i % kGroups);
      }
    }
    __syncthreads();  // before the next row's tile
  }
}

}  // namespace mkrs::cuda::gguf_unpacking
