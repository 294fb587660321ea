// Every op's schema; the only place where a signature is written down.
// Implementations: csrc/cpu, csrc/mps, csrc/cuda; fakes, autograd and oracles: mergekit_torch/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(mkrs, m) {
  m.def(
      "quantize(Tensor weight, int bits, int group_size, str scheme, "
      "ScalarType? scale_dtype=None) -> (Tensor codes, Tensor scale, Tensor zero)");
  m.def(
      "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? offset, int bits, "
      "int group_size, SymInt in_features, ScalarType dtype) -> Tensor");
  // dequantize(out=): mutates and returns nothing, the form that functionalization understands.
  m.def(
      "dequantize_into(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? offset, int bits, "
      "int group_size, SymInt in_features, Tensor(a!) out) -> ()");
  m.def(
      "dequant_matmul(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point, "
      "Tensor? offset, Tensor? bias, int bits, int group_size, str compute=\"exact\") -> Tensor");
  // Several weights of one format and one input; zero_point, offset and bias are empty or whole.
  // compute has no default: autograd of list arguments needs every argument present.
  m.def(
      "dequant_matmul_many(Tensor input, Tensor[] codes, Tensor[] scale, Tensor[] zero_point, "
      "Tensor[] offset, Tensor[] bias, int bits, int group_size, str compute) -> Tensor[]");
  m.def(
      "dequant_matmul_t(Tensor input, Tensor codes, Tensor scale, Tensor? zero_point, "
      "Tensor? offset, int bits, int group_size, SymInt in_features) -> Tensor");
  m.def(
      "dequant_embedding(Tensor indices, Tensor codes, Tensor scale, Tensor? zero_point, "
      "Tensor? offset, int bits, int group_size, SymInt in_features, ScalarType dtype) -> Tensor");
  m.def(
      "dequant_reduce(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? offset, int bits, "
      "int group_size, SymInt in_features, str reduction) -> Tensor");
  m.def(
      "gguf_unpack(Tensor blocks, int ggml_type, int rows, int in_features) -> "
      "(Tensor codes, Tensor scale, Tensor zero)");

  // Memory (csrc/memory). Arenas, frames and blocks are named by handles; private to
  // mergekit_torch.memory.
  m.def("_arena_create(int budget, str strategy, int max_cached) -> int");
  m.def("_arena_close(int arena) -> ()");
  m.def("_arena_empty(int arena, int[] size, ScalarType dtype) -> Tensor");
  m.def("_arena_trim(int arena, int keep) -> int");
  m.def("_arena_stats(int arena) -> int[]");
  m.def("_arena_frame_open(int arena, int size_hint) -> int");
  m.def("_arena_frame_empty(int frame, int[] size, ScalarType dtype) -> Tensor");
  m.def("_arena_frame_close(int frame) -> ()");
  m.def("_arena_block(int arena, int nbytes) -> int");
  m.def("_arena_block_over(int arena, Tensor view, int charge) -> int");
  m.def("_arena_block_tensor(int block, int offset, int[] size, ScalarType dtype) -> Tensor");
  m.def("_arena_block_tensors(int block) -> int");
  m.def("_arena_block_size(int block) -> int");
  m.def("_arena_block_release(int block) -> ()");
  m.def(
      "_read_file(Tensor(a!) out, int fd, int offset, int row_bytes, int row_stride, int rows, "
      "int threads) -> (int error, int position)");
  m.def("_map_resident_pages(Tensor view) -> bool");
  // Whether this thread's ops on the CPU do without torch's other threads.
  m.def("_run_serially(bool on) -> ()");
  // What this machine was given, as JSON: for people and for `mergekit_torch.doctor`.
  m.def("_cpu_info() -> str");
}
