// A whole product: plan, input preparation, threads.
#pragma once

#include "cpu/isa.h"

namespace mkrs::cpu {

// out[m, n] = sum_k x[m, k] w[n, k] + bias[n]; bias has out's type, or is null.
struct Product {
  const QuantizedWeight* w;
  const void* bias;
  Output out;
};

// Products with one input. Neighbours of one format share its preparation and one division over
// threads.
void matmul_many(const Product* products, int64_t count, const Matrix& x, Compute compute);

}  // namespace mkrs::cpu
