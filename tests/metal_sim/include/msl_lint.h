// Metal's types and functions as OpenCL C++ sees them, for lint.py: declarations only, with the
// address spaces that Metal demands. clang's OpenCL C++ mode enforces those as Metal's compiler does.
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __bf16 bfloat;
#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

namespace metal {
template <typename T, int N> using vec = T __attribute__((ext_vector_type(N)));
#define MSL_VECTORS(T) typedef vec<T, 2> T##2; typedef vec<T, 3> T##3; typedef vec<T, 4> T##4;
MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(int)
MSL_VECTORS(uint) MSL_VECTORS(long) MSL_VECTORS(ulong) MSL_VECTORS(half) MSL_VECTORS(bfloat)
MSL_VECTORS(float)

template <typename V, typename A> V msl_make(A a);
template <typename V, typename A, typename B> V msl_make(A a, B b);
template <typename V, typename A, typename B, typename C> V msl_make(A a, B b, C c);
template <typename V, typename A, typename B, typename C, typename D> V msl_make(A, B, C, D);
template <typename To, typename From> To as_type(From value);

float fma(float, float, float);
float rint(float);
float floor(float);
float ceil(float);
float fabs(float);
float sqrt(float);
float exp2(float);
bool isnan(float);
bool isinf(float);
bool isfinite(float);
int abs(int);
template <typename T> T select(T, T, bool);
template <typename T, int N> T dot(vec<T, N>, vec<T, N>);
#define MSL_ORDER(T) T min(T, T); T max(T, T); T clamp(T, T, T);
MSL_ORDER(uchar) MSL_ORDER(int) MSL_ORDER(uint) MSL_ORDER(float)

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <typename T> T simd_sum(T);
template <typename T> T simd_min(T);
template <typename T> T simd_max(T);
bool simd_any(bool);
bool simd_all(bool);
template <typename T> T simd_shuffle(T, ushort);
template <typename T> T simd_shuffle_xor(T, ushort);
template <typename T> T simd_broadcast(T, ushort);

template <typename T, int R, int C> struct simdgroup_matrix { T element[2]; };
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
template <typename T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
template <typename T>
void simdgroup_load(__private simdgroup_matrix<T, 8, 8>&, const __local T*, ulong = 8,
                    ulong2 = ulong2{0, 0}, bool = false);
template <typename T>
void simdgroup_load(__private simdgroup_matrix<T, 8, 8>&, const __global T*, ulong = 8,
                    ulong2 = ulong2{0, 0}, bool = false);
template <typename T>
void simdgroup_store(__private const simdgroup_matrix<T, 8, 8>&, __local T*, ulong = 8);
template <typename T>
void simdgroup_store(__private const simdgroup_matrix<T, 8, 8>&, __global T*, ulong = 8);
template <typename T>
void simdgroup_multiply_accumulate(__private simdgroup_matrix<T, 8, 8>&,
                                   __private const simdgroup_matrix<T, 8, 8>&,
                                   __private const simdgroup_matrix<T, 8, 8>&,
                                   __private const simdgroup_matrix<T, 8, 8>&);
}  // namespace metal
using namespace metal;
