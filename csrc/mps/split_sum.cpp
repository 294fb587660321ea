#include "mps/matmul.h"

namespace mkrs::mps {

void sum_parts(const char* op, const Tensor& partial, const std::optional<Tensor>& bias,
               const Tensor& out, int64_t rows, int64_t outputs, int64_t parts, Float type) {
  constexpr uint64_t kThreads = 128;
  Launch launch(op, kernel(op, "split_sum", "split_sum", {metal_type(type)}));
  launch.tensor(partial)
      .tensor(bias.has_value() ? *bias : out)
      .tensor(out)
      .pair(rows, outputs, "the output's shape")
      .pair(parts, bias.has_value() ? 1 : 0, "parts")
      .run({ceil_div(outputs, kThreads), static_cast<uint64_t>(rows)}, {kThreads});
}

}  // namespace mkrs::mps
