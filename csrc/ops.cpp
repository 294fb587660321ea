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
  // What this machine was given, as JSON: for people and for `mergekit_torch.doctor`.
  m.def("_cpu_info() -> str");
}
