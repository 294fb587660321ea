#include "cpu/matmul.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "cpu/scratch.h"
#include "cpu/threads.h"

namespace mkrs::cpu {
namespace {

#include "cpu/convert.inc"

bool prepare(const MatmulPlan& plan, const QuantizedWeight& w, const Matrix& x, void* scratch) {
  std::atomic<bool> ok{true};
  parallel_items(plan.units, x.rows * w.in_features / std::max<int64_t>(1, plan.units),
                 [&](int64_t begin, int64_t end) {
                   if (!kernels().prepare(plan, w, x, begin, end, scratch)) ok = false;
                 });
  return ok;
}

// Input rows that one item of parallel work takes. They are split only where the weights' rows are
// too few to give every thread some, because each part reads and unpacks the weights again.
int64_t rows_per_item(int64_t weight_items, int64_t input_rows) {
  constexpr int64_t kEnoughItems = 16;
  if (weight_items >= kEnoughItems) return input_rows;
  const int64_t parts = (kEnoughItems + weight_items - 1) / weight_items;
  const int64_t rows = (input_rows + parts - 1) / parts;
  return std::max<int64_t>(1, (rows + kInputAlign - 1) / kInputAlign) * kInputAlign;
}

// Rows [begin, end), counted in items through all products, times the input.
void multiply_items(const MatmulPlan& plan, const Product* products, int64_t count, const Matrix& x,
                    const char* scratch, int64_t begin, int64_t end, int64_t m) {
  const int64_t rows = plan.weight_rows;
  int64_t first = 0;  // item that product i starts with
  for (int64_t i = 0; i < count; ++i) {
    const Product& p = products[i];
    const int64_t own = (p.w->rows + rows - 1) / rows;
    const int64_t from = std::max<int64_t>(0, begin - first);
    const int64_t to = std::min(own, end - first);
    if (from < to) {
      Output out = p.out;
      out.data = static_cast<char*>(out.data) + m * out.stride * float_size(out.type);
      kernels().matmul(plan, *p.w, x, scratch, p.bias, from * rows, std::min(p.w->rows, to * rows),
                       out);
    }
    first += own;
  }
}

void multiply(const MatmulPlan& plan, const Product* products, int64_t count, const Matrix& x,
              const void* scratch) {
  const int64_t rows = plan.weight_rows;
  int64_t items = 0;
  for (int64_t i = 0; i < count; ++i) items += (products[i].w->rows + rows - 1) / rows;
  if (items == 0) return;
  const int64_t inputs = rows_per_item(items, x.rows);
  const int64_t blocks = (x.rows + inputs - 1) / inputs;
  // Few inputs cost a pass over the codes; many cost arithmetic.
  const int64_t elements =
      rows * products[0].w->in_features * std::max<int64_t>(1, std::min(inputs, x.rows) / 4);
  parallel_items(items * blocks, elements, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t m = begin / items * inputs;
      const int64_t from = begin % items;
      const int64_t to = std::min(items, from + end - begin);
      const char* data = static_cast<const char*>(x.data) + m * x.stride * float_size(x.type);
      const Matrix part{data, std::min(inputs, x.rows - m), x.stride, x.type};
      multiply_items(plan, products, count, part,
                     static_cast<const char*>(scratch) + m / plan.unit_rows * plan.unit_bytes, from,
                     to, m);
      begin += to - from;
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

// How many parts along K a product of few weight rows is cut into. A matter of its shape alone: the
// result then does not depend on the number of threads.
int64_t feature_parts(const QuantizedWeight& w, int64_t input_rows) {
  constexpr int64_t kFewRows = 8, kFewInputs = 64, kMostParts = 16;
  if (w.rows > kFewRows || input_rows > kFewInputs) return 1;
  return std::clamp<int64_t>(w.rows * w.in_features / (2 * kElementsPerThread), 1, kMostParts);
}

// Columns [begin, end) of a weight; begin starts a group and a byte.
QuantizedWeight columns_of(const QuantizedWeight& w, int64_t begin, int64_t end) {
  QuantizedWeight part = w;
  const int64_t group = w.groups == 1 ? 0 : begin / w.group_size;
  const int64_t scale_size = float_size(w.scale_type);
  part.codes += begin * w.bits / 8;
  part.scale = static_cast<const char*>(w.scale) + group * scale_size;
  if (w.zero != nullptr) {
    const int64_t size = w.scheme == Scheme::Affine ? scale_size : 1;
    part.zero = static_cast<const char*>(w.zero) + group * size;
  }
  part.in_features = end - begin;
  if (w.groups > 1) part.groups = (end - begin + w.group_size - 1) / w.group_size;
  return part;
}

// The product in parts along K, each with its own sums. False if some activations have no
// fixed-point form; nothing is written then.
bool multiply_parts(const Product& product, int64_t parts, const Matrix& x, Compute compute) {
  const QuantizedWeight& w = *product.w;
  constexpr int64_t kAlign = 256;  // of every group size
  const int64_t columns = (w.in_features / parts + kAlign - 1) / kAlign * kAlign;
  parts = (w.in_features + columns - 1) / columns;
  const int64_t results = x.rows * w.rows;
  std::vector<float> sums(static_cast<size_t>(parts * results));
  std::atomic<bool> ok{true};
  parallel_items(parts, w.rows * columns, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i * columns;
      const QuantizedWeight part = columns_of(w, k, std::min(w.in_features, k + columns));
      const char* data = static_cast<const char*>(x.data) + k * float_size(x.type);
      const Matrix input{data, x.rows, x.stride, x.type};
      const MatmulPlan plan = kernels().plan(part, input, compute);
      const Scratch scratch(plan.units * plan.unit_bytes);
      if (plan.units != 0 && !kernels().prepare(plan, part, input, 0, plan.units, scratch.data())) {
        ok = false;
        return;
      }
      kernels().matmul(plan, part, input, scratch.data(), nullptr, 0, w.rows,
                       {sums.data() + i * results, w.rows, Float::F32});
    }
  });
  if (!ok) return false;
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t n = 0; n < w.rows; ++n) {
      float sum = product.bias == nullptr ? 0.0f : load_float(product.bias, n, product.out.type);
      for (int64_t i = 0; i < parts; ++i) sum += sums[i * results + m * w.rows + n];
      store_float(product.out.data, m * product.out.stride + n, product.out.type, sum);
    }
  }
  return true;
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
    const int64_t parts = n == 1 ? feature_parts(*products[i].w, x.rows) : 1;
    if (parts > 1 && multiply_parts(products[i], parts, x, compute)) {
      ++i;
      continue;
    }
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
