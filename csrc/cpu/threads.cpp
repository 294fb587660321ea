#include "cpu/threads.h"

#include "checks.h"

namespace mkrs {
namespace {

void run_serially(bool on) {
  cpu::serial_thread = on;
}

}  // namespace
}  // namespace mkrs

STABLE_TORCH_LIBRARY_IMPL(mkrs, CompositeExplicitAutograd, m) {
  m.impl("_run_serially", TORCH_BOX(&mkrs::run_serially));
}
