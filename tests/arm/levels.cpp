// Compares every level of this processor with the generic one, kernel by kernel, without torch.
// Built for arm64 by a cross compiler and run under qemu by test_levels.py; runs on x86-64 too.
#include <algorithm>
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
  Weight(const Weight&) = delete;
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

// `planned` is the type that the plan is made for: it decides how many limbs activations get.
std::vector<float> product(const Kernels& level, const QuantizedWeight& w, const Matrix& x,
                           Compute compute, Float planned, Regime* regime = nullptr) {
  std::vector<float> out(static_cast<size_t>(x.rows * w.rows));
  const Output target{out.data(), w.rows, Float::F32};
  Matrix like = x;
  like.type = planned;
  const MatmulPlan plan = level.plan(w, like, compute);
  void* scratch = std::aligned_alloc(64, static_cast<size_t>(plan.units * plan.unit_bytes + 64));
  if (!level.prepare(plan, w, x, 0, plan.units, scratch)) std::abort();
  // In two calls that meet at an odd row, as threads divide the work.
  const int64_t middle = w.rows / 2 / plan.weight_rows * plan.weight_rows;
  level.matmul(plan, w, x, scratch, nullptr, 0, middle, target);
  level.matmul(plan, w, x, scratch, nullptr, middle, w.rows, target);
  std::free(scratch);
  if (regime != nullptr) *regime = plan.regime;
  return out;
}

int code_at(const QuantizedWeight& w, int64_t row, int64_t k) {
  const int per_byte = 8 / w.bits;
  const int byte = w.codes[row * w.codes_stride + k / per_byte];
  return byte >> (k % per_byte * w.bits) & ((1 << w.bits) - 1);
}

void set_code(Weight& w, int64_t row, int64_t k, int code) {
  const int per_byte = 8 / w.view.bits, shift = static_cast<int>(k % per_byte) * w.view.bits;
  uint8_t& byte = w.codes[row * w.view.codes_stride + k / per_byte];
  byte = static_cast<uint8_t>((byte & ~(((1 << w.view.bits) - 1) << shift)) | code << shift);
}

constexpr Float kPlanned[3] = {Float::F32, Float::F16, Float::F32};  // for 1, 2, 3 limbs
constexpr double kTop[3] = {127, 32639, 8355709};

// Limbs as limbs.h defines them, in double: what differs from it is float32 rounding, once per span
// and lane, not once per weight.
void check_limbs(const Kernels& level, const Weight& w, int64_t m) {
  const QuantizedWeight& v = w.view;
  const int64_t k = v.in_features, n = v.rows;
  std::vector<float> x(m * k);
  for (float& value : x) value = gauss() * std::exp2(static_cast<float>(pick(-6, 6)));
  const Matrix input{x.data(), m, k, Float::F32};
  for (int limbs = 1; limbs <= 3; ++limbs) {
    const Compute compute = limbs == 1 ? Compute::Int8 : Compute::Exact;
    Regime regime;
    const std::vector<float> got = product(level, v, input, compute, kPlanned[limbs - 1], &regime);
    if (regime == Regime::Float) continue;
    const int64_t span = limbs == 1          ? int8_span(v.group_size)
                         : v.groups == 1     ? 64
                         : v.group_size < 64 ? v.group_size
                                             : 64;
    const float top = static_cast<float>(kTop[limbs - 1]);
    std::vector<float> expected(m * n), magnitude(m * n);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < n; ++r) {
        double total = 0, size = 0;
        for (int64_t s = 0; s < k; s += span) {
          const int64_t end = std::min(k, s + span), at = r * v.scale_stride + s / v.group_size;
          float largest = 0;
          for (int64_t j = s; j < end; ++j) largest = std::max(largest, std::fabs(x[i * k + j]));
          const float inverse = top / largest;
          const int center = v.scheme == Scheme::Symmetric ? 1 << (v.bits - 1) : 0;
          const double shift = v.scheme == Scheme::Affine       ? w.offset[at]
                               : v.scheme == Scheme::Asymmetric ? -w.scale[at] * w.zero_point[at]
                                                                : 0.0;
          int64_t sum = 0, digits = 0, absolute = 0;
          for (int64_t j = s; j < end; ++j) {
            const int64_t digit = static_cast<int64_t>(std::nearbyintf(x[i * k + j] * inverse));
            const int64_t term = digit * (code_at(v, r, j) - center);
            sum += term;
            absolute += std::llabs(term);
            digits += digit;
          }
          const double unit = largest / top;
          total += unit * (w.scale[at] * sum + shift * digits);
          size += std::fabs(unit) * (std::fabs(w.scale[at]) * absolute + std::fabs(shift * digits));
        }
        expected[i * n + r] = static_cast<float>(total);
        magnitude[i * n + r] = static_cast<float>(size);
      }
    }
    close(limbs == 1   ? "one limb"
          : limbs == 2 ? "two limbs"
                       : "three limbs",
          level, w, got, expected, magnitude, 2 * (k / span + 1));
  }
}

// Operands for which every float operation is exact, so the result must be the integer one to the
// bit: scales are powers of two, each span's largest activation meets a weight of zero, and the
// others' products stay below 2**24 units.
void check_integers(const Kernels& level, Weight& w, int64_t m) {
  QuantizedWeight& v = w.view;
  const int64_t k = v.in_features, n = v.rows;
  for (float& s : w.scale) s = 0.25f;
  for (float& o : w.offset) o = 0.0f;
  for (uint8_t& z : w.zero_point) z = 0;
  const int zero = v.scheme == Scheme::Symmetric ? 1 << (v.bits - 1) : 0;
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t j = 0; j < k; j += 16) set_code(w, r, j, zero);
  }
  for (int limbs = 1; limbs <= 3; ++limbs) {
    const int digit = pick(0, limbs - 1);  // the limb that the products start in
    const double room = 0x1p24 / static_cast<double>(k) / ((1 << v.bits) - 1);
    const double unit = std::exp2(8.0 * digit);
    const int most = static_cast<int>(std::min(room, std::floor(kTop[limbs - 1] / unit)));
    std::vector<float> x(m * k);
    std::vector<int64_t> integers(m * k);
    for (int64_t i = 0; i < m * k; ++i) {
      const bool largest = i % k % 16 == 0;
      const double value =
          largest ? (pick(0, 1) ? 1 : -1) * kTop[limbs - 1] : unit * pick(-most, most);
      integers[i] = static_cast<int64_t>(value);
      x[i] = static_cast<float>(value) * 0x1p-9f;
    }
    const Matrix input{x.data(), m, k, Float::F32};
    const Compute compute = limbs == 1 ? Compute::Int8 : Compute::Exact;
    Regime regime;
    const std::vector<float> got = product(level, v, input, compute, kPlanned[limbs - 1], &regime);
    if (regime == Regime::Float) continue;
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t r = 0; r < n; ++r) {
        int64_t sum = 0;
        for (int64_t j = 0; j < k; ++j) sum += integers[i * k + j] * (code_at(v, r, j) - zero);
        const double difference = static_cast<double>(sum) * 0x1p-11 - got[i * n + r];
        if (difference != 0.0) fail("integer part", level.name, w, difference);
      }
    }
  }
}

void check(const Kernels& generic, const Kernels& level) {
  const int bits = 8 >> pick(0, 2);
  // Now and then several tiles of rows, of depth or of inputs.
  const int large = pick(0, 29);
  const int64_t n = large == 0 ? pick(90, 110) : pick(1, 40);
  const int64_t k = large <= 1 ? pick(257, 1300) : pick(1, 300);
  const int64_t m = large == 1 ? pick(30, 70) : large == 2 ? pick(250, 270) : pick(1, 20);
  const int64_t group = pick(0, 5) == 0 ? k : int64_t{16} << pick(0, 4);
  Weight w(n, k, bits, group, static_cast<Scheme>(pick(0, 2)));

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
          product(generic, w.view, input, compute, Float::F32),
          product(level, w.view, input, compute, Float::F32), forward, k);
  }
  check_limbs(level, w, m);
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

  check_integers(level, w, m);  // changes the weight
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
