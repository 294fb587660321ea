// Dot products of codes and activations that never shift a code.
#pragma once

#include "format.h"

// Code i of a block sits in word i / (16 / BITS) at bit BITS * (i % (16 / BITS)). Masked in place
// it is the code times 2**bit, so the activation is divided by that power once (exactly) and a
// weight costs one AND, one conversion and one fma.
template <int BITS>
struct Masked {
  static constant constexpr int PER_WORD = 16 / BITS;

  static inline float value(thread const ushort* words, int i) {
    const ushort mask = ushort(((1 << BITS) - 1) << (BITS * (i % PER_WORD)));
    return float(ushort(words[i / PER_WORD] & mask));
  }

  // 2**-bit of code i.
  static inline float unit(int i) { return 1.0f / float(1 << (BITS * (i % PER_WORD))); }
};

// 16 activations from x, 0 past `left`.
template <typename T>
inline void load_activations(device const T* x, int left, thread float* values) {
  if (left >= BLOCK) {
    UNROLL
    for (int i = 0; i < BLOCK; i++) values[i] = float(x[i]);
  } else {
    UNROLL
    for (int i = 0; i < BLOCK; i++) values[i] = i < left ? float(x[i]) : 0.0f;
  }
}

// What is added per group besides scale * sum(code * x), as a factor of sum(x).
template <int BITS, int SCHEME>
struct Shift {
  template <typename Z>
  static inline float factor(float scale, device const Z* zero, int group) {
    if (SCHEME == SYMMETRIC) return -scale * float(1 << (BITS - 1));
    if (SCHEME == ASYMMETRIC) return -scale * float(zero[group]);
    return float(zero[group]);
  }
};
