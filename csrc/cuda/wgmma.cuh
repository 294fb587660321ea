// Hopper's warpgroup products (sm_90a) with the first operand in registers.
#pragma once

#include "common.cuh"

namespace mkrs::cuda::wgmma {

// Matrix descriptor of rows of 128 bytes along k, swizzled over 8 rows, 1024-byte aligned.
__device__ __forceinline__ uint64_t descriptor(uint32_t shared) {
  return (uint64_t{shared} & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{64} << 32 |
         uint64_t{1} << 62;
}

__device__ __forceinline__ void fence() {
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
}

__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;\n" ::: "memory");
}

// d[64 x N] (+)= a[64 x 16] * b[N x 16] transposed; each warp holds 16 rows, laid out as in
// m16n8k16.
template <typename T, int N>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                         int accumulate);

// One wrapper an instruction: the accumulators are operands of the assembly one by one.
// clang-format off
#define MKRS_R8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define MKRS_R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define MKRS_R64 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define MKRS_R128 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31," \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47," \
  "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63," \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79," \
  "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95," \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111," \
  "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define MKRS_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MKRS_D8(i) MKRS_D4(i), MKRS_D4(i + 4)
#define MKRS_D32(i) MKRS_D8(i), MKRS_D8(i + 8), MKRS_D8(i + 16), MKRS_D8(i + 24)
#define MKRS_D64(i) MKRS_D32(i), MKRS_D32(i + 32)
#define MKRS_D128(i) MKRS_D64(i), MKRS_D64(i + 64)
// N / 2 accumulators, R in the assembly; after them the operands A, B and `accumulate`.
#define MKRS_WGMMA(T, NAME, N, R, A, B, ACCUMULATE, ...)                                          \
  template <>                                                                                     \
  __device__ __forceinline__ void multiply<T, N>(float (&d)[N / 2], const uint32_t (&a)[4],       \
                                                 uint64_t b, int accumulate) {                    \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE ", 0;\n"                          \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" R "}, {" A  \
                 "}, " B ", p, 1, 1, 0;\n}\n"                                                     \
                 : __VA_ARGS__                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));          \
  }
#define MKRS_WGMMA_OF(T, NAME)                                                                    \
  MKRS_WGMMA(T, NAME, 16, MKRS_R8, "%8,%9,%10,%11", "%12", "%13", MKRS_D8(0))                     \
  MKRS_WGMMA(T, NAME, 64, MKRS_R32, "%32,%33,%34,%35", "%36", "%37", MKRS_D32(0))                 \
  MKRS_WGMMA(T, NAME, 128, MKRS_R64, "%64,%65,%66,%67", "%68", "%69", MKRS_D64(0))                \
  MKRS_WGMMA(T, NAME, 256, MKRS_R128, "%128,%129,%130,%131", "%132", "%133", MKRS_D128(0))
MKRS_WGMMA_OF(__half, "f16")
MKRS_WGMMA_OF(__nv_bfloat16, "bf16")
#undef MKRS_R8
#undef MKRS_R32
#undef MKRS_R64
#undef MKRS_R128
#undef MKRS_D4
#undef MKRS_D8
#undef MKRS_D32
#undef MKRS_D64
#undef MKRS_D128
#undef MKRS_WGMMA
#undef MKRS_WGMMA_OF
// clang-format on

}  // namespace mkrs::cuda::wgmma
