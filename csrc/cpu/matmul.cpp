#include "cpu/matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace mkrs::cpu {
namespace {

bool prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, void* scratch) {
  std::atomic<bool> ok{true};
  parallel_items(plan.units, x.rows * w.in_features / std::max<int64_t>(1, plan.units),
                 [&](int64_t begin, int64_t end) {
                   if (!kernels().prepare(plan, w, x, begin, end, scratch)) ok = false;
                 });
  return ok;
}

void multiply(const MatmulPlan& plan, const Product* products, int64_t count, const Matrix& x,
              const void* scratch) {
  const int64_t rows = plan.weight_rows;
  int64_t items = 0;
  for (int64_t i = 0; i < count; ++i) items += (products[i].w->rows + rows - 1) / rows;
  // Few inputs cost a pass over the codes; many cost arithmetic.
  const int64_t elements = rows * products[0].w->in_features * std::max<int64_t>(1, x.rows / 4);
  parallel_items(items, elements, [&](int64_t begin, int64_t end) {
    int64_t first = 0;  // item that product i starts with
    for (int64_t i = 0; i < count; ++i) {
      const Product& p = products[i];
      const int64_t own = (p.w->rows + rows - 1) / rows;
      const int64_t from = std::max<int64_t>(0, begin - first);
      const int64_t to = std::min(own, end - first);
      if (from < to) {
        kernels().matmul(plan, *p.w, x, scratch, p.bias, from * rows,
                         std::min(p.w->rows, to * rows), p.out);
      }
      first += own;
    }
  });
}

Matrix row_of(const Matrix& x, int64_t m) {
  const char* data = static_cast<const char*>(x.data) + m * x.stride * float_size(x.type);
  return {data, 1, x.stride, x.type};
}

// Some activations have no fixed-point form (inf, NaN, tiny spans): their rows are computed in
// floats as they are, and the rest as if they were not there.
void multiply_unusual(const MatmulPlan& plan, const Product* products, int64_t count,
                      const Matrix& x, Compute compute, void* scratch) {
  const QuantizedWeight& w = *products[0].w;
  const int64_t size = float_size(x.type);
  std::vector<char> usual(static_cast<size_t>(x.rows * w.in_features * size));
  std::vector<int64_t> unusual;
  for (int64_t m = 0; m < x.rows; ++m) {
    const Matrix row = row_of(x, m);
    const MatmulPlan single = kernels().plan(w, row, compute);
    char* copy = usual.data() + m * w.in_features * size;
    if (kernels().prepare(single, w, row, 0, single.units, scratch)) {
      std::memcpy(copy, row.data, static_cast<size_t>(w.in_features * size));
    } else {
      unusual.push_back(m);  // its copy stays zero
    }
  }
  const Matrix rest{usual.data(), x.rows, w.in_features, x.type};
  prepare(plan, w, rest, scratch);
  multiply(plan, products, count, rest, scratch);
  for (const int64_t m : unusual) {
    for (int64_t i = 0; i < count; ++i) {
      Product single = products[i];
      single.out.data =
          static_cast<char*>(single.out.data) + m * single.out.stride * float_size(x.type);
      multiply(MatmulPlan{}, &single, 1, row_of(x, m), nullptr);
    }
  }
}

// Products whose weights read the same prepared input.
bool share_input(const QuantizedWeight& a, const QuantizedWeight& b) {
  return a.bits == b.bits && a.scheme == b.scheme && a.in_features == b.in_features &&
         a.group_size == b.group_size;
}

}  // namespace

void matmul_many(const Product* products, int64_t count, const Matrix& x, Compute compute) {
  if (x.rows == 0) return;
  for (int64_t i = 0; i < count;) {
    int64_t n = 1;
    while (i + n < count && share_input(*products[i].w, *products[i + n].w)) ++n;
    const MatmulPlan plan = kernels().plan(*products[i].w, x, compute);
    const QuantizedWeight& w = *products[i].w;
    // Room for one row's own plan too, which a row without fixed-point form is found with.
    const MatmulPlan single = kernels().plan(w, row_of(x, 0), compute);
    const Scratch scratch(std::max(plan.units * plan.unit_bytes, single.units * single.unit_bytes));
    if (plan.units == 0 || prepare(plan, w, x, scratch.data())) {
      multiply(plan, products + i, n, x, scratch.data());
    } else {
      multiply_unusual(plan, products + i, n, x, compute, scratch.data());
    }
    i += n;
  }
}

}  // namespace mkrs::cpu
