// A whole product: plan, input preparation, threads.
#pragma once

#include "cpu/isa.h"

namespace mkrs::cpu {

// out[m, n] = sum_k x[m, k] w[n, k] + bias[n]; bias has out's type, or is null.
void matmul(const QuantizedWeight& w, const Matrix& x, Compute compute, const void* bias,
            const Output& out);

// The same for several weights with one input. Weights that take the same plan share its
// preparation and one division over threads.
struct Product {
  const QuantizedWeight* w;
  const void* bias;
  Output out;
};
void matmul_many(const Product* products, int64_t count, const Matrix& x, Compute compute);

}  // namespace mkrs::cpu
