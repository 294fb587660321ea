// Compares every level of this processor with the generic one, kernel by kernel, without torch.
// Built for arm64 by a cross compiler and run under qemu by test_levels.py; runs on x86-64 too.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/isa.h"

using namespace mkrs;
using namespace mkrs::cpu;

namespace {

std::mt19937 rng(20240607);

int pick(int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(rng);
}

float gauss() {
  return std::normal_distribution<float>()(rng);
}

// A weight with row strides longer than its rows, as column slices have.
struct Weight {
  std::vector<uint8_t> codes, zero_point;
  std::vector<float> scale, offset;
  QuantizedWeight view;

  Weight(int64_t n, int64_t k, int bits, int64_t group, Scheme scheme) {
    view.rows = n;
    view.in_features = k;
    view.bits = bits;
    view.group_size = group < k ? group : k;
    view.groups = num_groups(k, group);
    view.scheme = scheme;
    view.scale_type = Float::F32;
    const int64_t pad = pick(0, 3);
    view.codes_stride = code_bytes(k, bits) + pad;
    view.scale_stride = view.zero_stride = view.groups + pad;
    codes.resize(n * view.codes_stride);
    for (uint8_t& c : codes) c = static_cast<uint8_t>(pick(0, 255));
    scale.resize(n * view.scale_stride);
    offset.resize(scale.size());
    zero_point.resize(scale.size());
    for (float& s : scale) s = 0.02f * gauss();
    for (float& o : offset) o = 0.1f * gauss();
    for (uint8_t& z : zero_point) z = static_cast<uint8_t>(pick(0, (1 << bits) - 1));
    view.codes = codes.data();
    view.scale = scale.data();
    view.zero = scheme == Scheme::Affine       ? static_cast<const void*>(offset.data())
                : scheme == Scheme::Asymmetric ? static_cast<const void*>(zero_point.data())
                                               : nullptr;
  }
};

[[noreturn]] void fail(const char* what, const char* level, const Weight& w, double error) {
  std::printf("%s differs at level %s: bits %d scheme %d N %lld K %lld group %lld, by %g\n", what,
              level, w.view.bits, static_cast<int>(w.view.scheme),
              static_cast<long long>(w.view.rows), static_cast<long long>(w.view.in_features),
              static_cast<long long>(w.view.group_size), error);
  std::exit(1);
}

void same_bytes(const char* what, const Kernels& level, const Weight& w, const void* a,
                const void* b, size_t bytes) {
  if (std::memcmp(a, b, bytes) != 0) fail(what, level.name, w, 0.0);
}

// |a - b| within (terms + 8) float32 roundings of the sum of magnitudes each stands for.
void close(const char* what, const Kernels& level, const Weight& w, const std::vector<float>& a,
           const std::vector<float>& b, const std::vector<float>& magnitude, int64_t terms) {
  for (size_t i = 0; i < a.size(); ++i) {
    const double error = std::fabs(static_cast<double>(a[i]) - b[i]);
    const double bound = (terms + 8) * 0x1p-23 * magnitude[i] + 1e-37;
    if (!(error <= bound)) fail(what, level.name, w, error);
  }
}

std::vector<float> product(const Kernels& level, const QuantizedWeight& w, const Matrix& x,
                           Compute compute) {
  std::vector<float> out(static_cast<size_t>(x.rows * w.rows));
  const Output target{out.data(), w.rows, Float::F32};
  const MatmulPlan plan = level.plan(w, x, compute);
  void* scratch = std::aligned_alloc(64, static_cast<size_t>(plan.units * plan.unit_bytes + 64));
  if (!level.prepare(plan, w, x, 0, plan.units, scratch)) std::abort();
  level.matmul(plan, w, x, scratch, nullptr, 0, w.rows, target);
  std::free(scratch);
  return out;
}

void check(const Kernels& generic, const Kernels& level) {
  const int bits = 8 >> pick(0, 2);
  const int64_t n = pick(1, 40), k = pick(1, 300), m = pick(1, 20);
  const int64_t group = pick(0, 5) == 0 ? k : int64_t{16} << pick(0, 4);
  const Weight w(n, k, bits, group, static_cast<Scheme>(pick(0, 2)));

  std::vector<float> dense(n * k), other(n * k);
  generic.dequantize_rows(w.view, nullptr, 0, n, {dense.data(), k, Float::F32});
  level.dequantize_rows(w.view, nullptr, 0, n, {other.data(), k, Float::F32});
  same_bytes("dequantize f32", level, w, dense.data(), other.data(), 4 * dense.size());
  for (const Float type : {Float::F16, Float::BF16}) {
    std::vector<uint16_t> a(n * k), b(n * k);
    generic.dequantize_rows(w.view, nullptr, 0, n, {a.data(), k, type});
    level.dequantize_rows(w.view, nullptr, 0, n, {b.data(), k, type});
    same_bytes("dequantize to 16 bits", level, w, a.data(), b.data(), 2 * a.size());
  }

  std::vector<float> x(m * k), g(m * n);
  for (float& v : x) v = gauss();
  for (float& v : g) v = gauss();
  std::vector<float> forward(m * n), backward(m * k);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t r = 0; r < n; ++r) {
      for (int64_t j = 0; j < k; ++j) {
        // What a kernel may add up before a zero point or offset cancels it.
        const int64_t at = r * w.view.scale_stride + j / w.view.group_size;
        const float size = std::fabs(w.scale[at]) * (2 << bits) + std::fabs(w.offset[at]);
        forward[i * n + r] += std::fabs(x[i * k + j]) * size;
        backward[i * k + j] += std::fabs(g[i * n + r]) * size;
      }
    }
  }
  const Matrix input{x.data(), m, k, Float::F32};
  for (const Compute compute : {Compute::Exact, Compute::Int8}) {
    close(compute == Compute::Exact ? "matmul" : "matmul int8", level, w,
          product(generic, w.view, input, compute), product(level, w.view, input, compute), forward,
          k);
  }
  std::vector<float> a(m * k), b(m * k);
  const Matrix grad{g.data(), m, n, Float::F32};
  generic.matmul_t(w.view, grad, 0, k, {a.data(), k, Float::F32});
  level.matmul_t(w.view, grad, 0, k, {b.data(), k, Float::F32});
  close("matmul_t", level, w, a, b, backward, n);

  for (int kind = 0; kind < 5; ++kind) {
    std::vector<float> c(n), d(n);
    generic.reduce_rows(w.view, static_cast<Reduction>(kind), 0, n, c.data());
    level.reduce_rows(w.view, static_cast<Reduction>(kind), 0, n, d.data());
    same_bytes("reduce", level, w, c.data(), d.data(), 4 * c.size());
  }

  const Matrix weight{dense.data(), n, k, Float::F32};
  const auto quantize = [&](const Kernels& kernels) {
    const int64_t groups = w.view.groups;
    std::vector<uint8_t> out(n * (code_bytes(k, bits) + 8 * groups));
    QuantizeTarget t;
    t.codes = out.data();
    t.scale = out.data() + n * code_bytes(k, bits);
    std::vector<float> scale(n * groups), zero(n * groups);
    t.scale = scale.data();
    t.zero = zero.data();
    t.in_features = k;
    t.group_size = w.view.group_size;
    t.groups = groups;
    t.bits = bits;
    t.scheme = w.view.scheme;
    t.scale_type = Float::F32;
    int64_t bad = 0;
    if (kernels.quantize_rows(weight, t, 0, n, &bad) != QuantizeStatus::Ok) std::abort();
    uint8_t* tail = out.data() + n * code_bytes(k, bits);
    std::memcpy(tail, scale.data(), 4 * scale.size());
    std::memcpy(tail + 4 * scale.size(), zero.data(), 4 * zero.size());
    return out;
  };
  const std::vector<uint8_t> c = quantize(generic), d = quantize(level);
  same_bytes("quantize", level, w, c.data(), d.data(), c.size());
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  for (const std::string& name : available_isas()) {
    for (int i = 0; i < rounds; ++i) check(kernels_of("generic"), kernels_of(name));
    std::printf("%s: %d random weights agree with generic\n", name.c_str(), rounds);
  }
  return 0;
}
