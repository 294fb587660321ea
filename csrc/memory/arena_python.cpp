// Arena.empty without the dispatcher: `mergekit_torch._C.arena_empty`.
//
// Floor: torch takes about 0.4 µs to make a Python tensor over foreign memory and to let go of it
// again. An op call adds 2 µs of boxing, this function 0.15. The tensor goes to torch in a DLPack
// capsule, the one stable way from a C function to a tensor in Python; the structs are those of
// https://dmlc.github.io/dlpack/latest/c_api.html (before versions, which every consumer takes).
#include <Python.h>

#include <cstdlib>
#include <exception>
#include <new>

#include "memory/arena_ops.h"

namespace mkrs::memory {
namespace {

struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

constexpr int32_t kCpu = 1;
constexpr const char* kCapsule = "dltensor";  // its consumer renames it

void forget(DLManagedTensor* managed) {
  release(static_cast<Block*>(managed->context));
  std::free(managed);
}

void drop_capsule(PyObject* capsule) {
  if (PyCapsule_IsValid(capsule, kCapsule)) {
    forget(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, kCapsule)));
  }
}

// Sizes into `size`; false with a Python error.
bool read_sizes(PyObject* tuple, Py_ssize_t dims, int64_t* size) {
  for (Py_ssize_t i = 0; i < dims; ++i) {
    PyObject* item = PyTuple_GetItem(tuple, i);  // borrowed
    size[i] = item == nullptr ? -1 : PyLong_AsLongLong(item);
    if (size[i] != -1 || !PyErr_Occurred()) continue;
    if (PyErr_ExceptionMatches(PyExc_TypeError)) {
      PyErr_Format(PyExc_TypeError, "sizes must be integers, got %R", tuple);
    } else if (PyErr_ExceptionMatches(PyExc_OverflowError)) {
      PyErr_Format(PyExc_ValueError, "the size must be less than 2**60 bytes, got %R", tuple);
    }
    return false;
  }
  return true;
}

// arena_empty(arena: int, size: tuple, dtype: int) -> capsule. `size` holds sizes or one sequence
// of them; `dtype` is DLPack's code * 256 + bits.
PyObject* arena_empty(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3 || !PyTuple_Check(args[1])) {
    PyErr_SetString(PyExc_TypeError, "arena_empty takes an arena, a tuple and a dtype's code");
    return nullptr;
  }
  const int64_t arena = PyLong_AsLongLong(args[0]);
  const int64_t code = PyLong_AsLongLong(args[2]);
  if (PyErr_Occurred()) return nullptr;
  PyObject* sizes = args[1];
  PyObject* inner = nullptr;
  if (PyTuple_Size(sizes) == 1) {
    PyObject* only = PyTuple_GetItem(sizes, 0);
    if (!PyLong_Check(only) && PySequence_Check(only)) {
      inner = PySequence_Tuple(only);
      if (inner == nullptr) return nullptr;
      sizes = inner;
    }
  }
  const Py_ssize_t dims = PyTuple_Size(sizes);
  // The struct, then shape and strides.
  auto* managed = static_cast<DLManagedTensor*>(
      std::malloc(sizeof(DLManagedTensor) + 2 * dims * sizeof(int64_t)));
  PyObject* capsule = nullptr;
  if (managed == nullptr) {
    PyErr_NoMemory();
  } else {
    auto* shape = reinterpret_cast<int64_t*>(managed + 1);
    if (read_sizes(sizes, dims, shape)) {
      try {
        Block* block = acquire_for(arena, shape, dims, (code & 255) / 8);
        contiguous_strides(shape, dims, shape + dims);
        managed->tensor = {block->data,
                           {kCpu, 0},
                           static_cast<int32_t>(dims),
                           {static_cast<uint8_t>(code >> 8), static_cast<uint8_t>(code), 1},
                           shape,
                           shape + dims,
                           0};
        managed->context = block;
        managed->deleter = forget;
        capsule = PyCapsule_New(managed, kCapsule, drop_capsule);
        if (capsule == nullptr) release(block);
      } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
      }
    }
    if (capsule == nullptr) std::free(managed);
  }
  Py_XDECREF(inner);
  return capsule;
}

PyMethodDef functions[] = {
    {"arena_empty", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(arena_empty)),
     METH_FASTCALL, "A DLPack capsule of an uninitialized tensor from an arena."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr,
};

}  // namespace
}  // namespace mkrs::memory

PyMODINIT_FUNC PyInit__C() {
  return PyModule_Create(&mkrs::memory::module);
}
