// Included by prepass.py behind the kernels: reads their parameter types and calls them.
#pragma once

namespace msl {

template <typename T> struct ElementOf { static constexpr Element value = OTHER; };
#define MSL_ELEMENT(T, E) template <> struct ElementOf<T> { static constexpr Element value = E; };
MSL_ELEMENT(uchar, U8)
MSL_ELEMENT(char, I8)
MSL_ELEMENT(ushort, U16)
MSL_ELEMENT(short, I16)
MSL_ELEMENT(uint, U32)
MSL_ELEMENT(int, I32)
MSL_ELEMENT(ulong, U64)
MSL_ELEMENT(long, I64)
MSL_ELEMENT(half, F16)
MSL_ELEMENT(bfloat, BF16)
MSL_ELEMENT(float, F32)
MSL_ELEMENT(bool, BOOL)
#undef MSL_ELEMENT

template <typename F> struct Signature;
template <typename... P> struct Signature<void(P...)> {
  static constexpr int count = int(sizeof...(P));
  template <int I> using At = __type_pack_element<I, P...>;
};

template <typename T> struct Strip { typedef T type; static constexpr bool is_const = false; };
template <typename T> struct Strip<const T> { typedef T type; static constexpr bool is_const = true; };

template <typename P> struct Buffer;
template <typename T> struct Buffer<T*> {
  static constexpr Param describe(int index) {
    return Param{index, ElementOf<typename Strip<T>::type>::value, u32(sizeof(T)), true,
                 Strip<T>::is_const};
  }
  MSL_PLAIN static T* get(void* p) { return static_cast<T*>(p); }
};
template <typename T> struct Buffer<T&> {
  static_assert(Strip<T>::is_const, "a buffer reference must be `constant`");
  static constexpr Param describe(int index) {
    return Param{index, ElementOf<typename Strip<T>::type>::value, u32(sizeof(T)), false, true};
  }
  MSL_PLAIN static T& get(void* p) { return *static_cast<T*>(p); }
};

// Thread attributes: scalars take x of a 3-D value, vectors as many components as they have.
template <typename T> struct Attribute {
  MSL_PLAIN static T get(Size3 v) { return T(v.x); }
  MSL_PLAIN static T get(u32 v) { return T(v); }
};
template <typename T> struct Attribute<T __attribute__((ext_vector_type(2)))> {
  MSL_PLAIN static metal::vec<T, 2> get(Size3 v) { return metal::vec<T, 2>{T(v.x), T(v.y)}; }
};
template <typename T> struct Attribute<T __attribute__((ext_vector_type(3)))> {
  MSL_PLAIN static metal::vec<T, 3> get(Size3 v) { return metal::vec<T, 3>{T(v.x), T(v.y), T(v.z)}; }
};

}  // namespace msl
