// Builds generic.inc once per instruction set and chooses a level.
#include "cpu/isa.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "cpu/limbs.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

#include "cpu/x86_vnni.h"
#elif defined(__aarch64__)
#include <arm_neon.h>
#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

// Standard headers stay above: included under a target pragma, their inline functions would be
// compiled for that target and could be picked by the linker for everybody.

#define MKRS_ISA generic
#include "cpu/generic.inc"
#undef MKRS_ISA

#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12's own AVX-512 headers trip this one.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define MKRS_ISA avx2
#define MKRS_HAS_FMA 1
#define MKRS_HAS_F16C 1
#include "cpu/generic.inc"
#undef MKRS_ISA
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                         \
    __attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define MKRS_ISA avx512
#define MKRS_HAS_AVX512 1
#include "cpu/generic.inc"
#undef MKRS_ISA
#undef MKRS_HAS_AVX512
#undef MKRS_HAS_FMA
#undef MKRS_HAS_F16C
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#elif defined(__aarch64__)

// NEON is part of the arm64 baseline, so no target is needed.
#define MKRS_ISA neon
#define MKRS_HAS_FMA 1
#define MKRS_HAS_NEON 1
#include "cpu/generic.inc"
#undef MKRS_ISA
#undef MKRS_HAS_FMA
#undef MKRS_HAS_NEON

#endif

namespace mkrs::cpu {
namespace {

// A level's integer kernels in front of the float kernels that it falls back to: for what it has no
// tiles for, and for activations without a fixed-point form.
template <const limbs::Level& LIMBS, const Kernels& FLOATS>
struct WithLimbs {
  static MatmulPlan plan(const QuantizedWeight& w, const Matrix& x, Compute compute) {
    MatmulPlan plan;
    if (w.in_features == 0) return plan;
    plan.limbs = limbs::limbs_of(x.type, compute);
    plan.span = limbs::span_of(w, compute);
    if (x.rows <= LIMBS.rows_inputs(w.bits, plan.limbs)) {
      plan.regime = Regime::Rows;
      plan.units = x.rows;
      plan.unit_bytes = LIMBS.rows_unit_bytes(w, plan.limbs, plan.span);
      plan.weight_rows = LIMBS.rows_weight_rows;
    } else if (LIMBS.tiles_units != nullptr) {
      plan.regime = Regime::Tiles;
      plan.units = LIMBS.tiles_units(x.rows, plan.limbs);
      plan.unit_rows = kInputAlign / LIMBS.tiles_units(kInputAlign, plan.limbs);
      plan.unit_bytes = LIMBS.tiles_unit_bytes(w, plan.limbs, plan.span);
      plan.weight_rows = LIMBS.tiles_weight_rows;
    } else {
      return FLOATS.plan(w, x, compute);
    }
    return plan;
  }

  static bool prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                      int64_t begin, int64_t end, void* scratch) {
    const auto prepare = plan.regime == Regime::Rows    ? LIMBS.rows_prepare
                         : plan.regime == Regime::Tiles ? LIMBS.tiles_prepare
                                                        : FLOATS.prepare;
    return prepare(plan, w, x, begin, end, scratch);
  }

  static void matmul(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x,
                     const void* scratch, const void* bias, int64_t begin, int64_t end,
                     const Output& out) {
    const auto matmul = plan.regime == Regime::Rows    ? LIMBS.rows_matmul
                        : plan.regime == Regime::Tiles ? LIMBS.tiles_matmul
                                                       : FLOATS.matmul;
    matmul(plan, w, x, scratch, bias, begin, end, out);
  }

  static Kernels table() {
    Kernels table = FLOATS;
    table.name = LIMBS.name;
    table.plan = plan;
    table.prepare = prepare;
    table.matmul = matmul;
    return table;
  }
};

#if defined(__x86_64__)
const Kernels kAvx2 = WithLimbs<avx2_limbs::level, avx2::table>::table();
const Kernels kAvxVnni = WithLimbs<avxvnni::level, avx2::table>::table();
const Kernels kAvx512 = WithLimbs<avx512_limbs::level, avx512::table>::table();
const Kernels kVnni = WithLimbs<vnni::level, avx512::table>::table();

#if defined(MKRS_AVXVNNI_AS_EVEX)  // x86_avxvnni.cpp says why
bool has_avxvnni() {
  return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
#else
// CPUID leaf 7, subleaf 1, EAX bit 4; not every compiler here knows the name.
bool has_avxvnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0;
}
#endif
#elif defined(__aarch64__)
const Kernels kDotprod = WithLimbs<dotprod::level, neon::table>::table();
const Kernels kI8mm = WithLimbs<i8mm::level, neon::table>::table();

#if defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() {
  return has_feature("hw.optional.arm.FEAT_DotProd");
}
bool has_i8mm() {
  return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM");
}
#elif defined(__linux__)
// Bits of the kernel's ABI; older headers lack the second name.
bool has_dotprod() {
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
}
bool has_i8mm() {
  return has_dotprod() && (getauxval(AT_HWCAP2) & (1ul << 13)) != 0;  // HWCAP2_I8MM
}
#else
// No way to ask here: the baseline is what is certain.
bool has_dotprod() {
  return false;
}
bool has_i8mm() {
  return false;
}
#endif
#endif

struct Level {
  const Kernels* table;
  bool supported;
  const limbs::Level* limbs = nullptr;  // its integer kernels, if it has any
};

std::vector<Level> levels() {
  std::vector<Level> found{{&generic::table, true}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  found.push_back({&kAvx2, avx2, &avx2_limbs::level});
  found.push_back({&kAvxVnni, avx2 && has_avxvnni(), &avxvnni::level});
  found.push_back({&kAvx512, avx512, &avx512_limbs::level});
  found.push_back({&kVnni, avx512 && __builtin_cpu_supports("avx512vnni"), &vnni::level});
#elif defined(__aarch64__)
  found.push_back({&neon::table, true});
  found.push_back({&kDotprod, has_dotprod(), &dotprod::level});
  found.push_back({&kI8mm, has_i8mm(), &i8mm::level});
#endif
  return found;
}

const Kernels& choose() {
  const std::vector<Level> all = levels();
  const char* forced = std::getenv("MKRS_CPU_ISA");
  const Kernels* best = nullptr;
  std::string names;
  for (const Level& level : all) {
    if (!level.supported) continue;
    names += (names.empty() ? "" : ", ") + std::string(level.table->name);
    best = level.table;
    if (forced != nullptr && std::strcmp(forced, level.table->name) == 0) return *level.table;
  }
  if (forced != nullptr && *forced != '\0') {
    throw std::runtime_error("mkrs: MKRS_CPU_ISA must be one of the levels this processor runs (" +
                             names + "), got '" + forced + "'");
  }
  return *best;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::vector<Threshold> thresholds() {
  for (const Level& level : levels()) {
    if (level.table != &kernels() || level.limbs == nullptr) continue;
    std::vector<Threshold> found;
    for (const auto& [name, count] : {std::pair<const char*, int>{"rows_inputs_f32", 3},
                                      {"rows_inputs_f16", 2},
                                      {"rows_inputs_int8", 1}}) {
      const int64_t most = level.limbs->rows_inputs(4, count);
      if (most < limbs::kAnyInputs) found.push_back({name, most});
    }
    found.push_back({"exact_span", limbs::kExactSpan});
    return found;
  }
  return {};
}

const Kernels& kernels_of(const std::string& name) {
  for (const Level& level : levels()) {
    if (level.supported && name == level.table->name) return *level.table;
  }
  throw std::runtime_error("mkrs: this processor does not run level '" + name + "'");
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.supported) names.emplace_back(level.table->name);
  }
  return names;
}

}  // namespace mkrs::cpu
