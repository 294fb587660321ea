// GGUF's block types and the native format that each maps onto without loss. Sizes are those of
// ggml's block structs (ggml-common.h).
#pragma once

#include "format.h"

namespace mkrs::gguf {

struct Layout {
  const char* name;
  int type;       // the number that files hold
  int block;      // weights in a block
  int bytes;      // of a block
  int bits;       // of a native code
  int group;      // weights of a native scale
  Scheme scheme;  // symmetric or affine
  Float scale;    // element type of native scales and offsets
  constexpr int groups() const { return block / group; }
  constexpr int codes() const { return block * bits / 8; }  // bytes of native codes
  constexpr bool affine() const { return scheme == Scheme::Affine; }
};

inline constexpr Layout Q4_0{"Q4_0", 2, 32, 18, 4, 32, Scheme::Symmetric, Float::F16};
inline constexpr Layout Q4_1{"Q4_1", 3, 32, 20, 4, 32, Scheme::Affine, Float::F16};
inline constexpr Layout Q5_0{"Q5_0", 6, 32, 22, 8, 32, Scheme::Symmetric, Float::F16};
inline constexpr Layout Q5_1{"Q5_1", 7, 32, 24, 8, 32, Scheme::Affine, Float::F16};
inline constexpr Layout Q8_0{"Q8_0", 8, 32, 34, 8, 32, Scheme::Symmetric, Float::F16};
inline constexpr Layout Q2_K{"Q2_K", 10, 256, 84, 2, 16, Scheme::Affine, Float::F32};
inline constexpr Layout Q3_K{"Q3_K", 11, 256, 110, 4, 16, Scheme::Symmetric, Float::F32};
inline constexpr Layout Q4_K{"Q4_K", 12, 256, 144, 4, 32, Scheme::Affine, Float::F32};
inline constexpr Layout Q5_K{"Q5_K", 13, 256, 176, 8, 32, Scheme::Affine, Float::F32};
inline constexpr Layout Q6_K{"Q6_K", 14, 256, 210, 8, 16, Scheme::Symmetric, Float::F32};

// A backend's types: structs with a member `layout`.
template <typename... T>
struct Types {};

// Calls run(type) with the one that files call `ggml_type`; false if there is none.
template <typename... T, typename Run>
bool with_type(Types<T...>, int64_t ggml_type, Run&& run) {
  const auto attempt = [&](auto type) {
    if (decltype(type)::layout.type != ggml_type) return false;
    run(type);
    return true;
  };
  return (attempt(T{}) || ...);
}

}  // namespace mkrs::gguf
