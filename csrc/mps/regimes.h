// Which kernel runs when: every threshold of the MPS backend.
//
// None is measured on a Mac yet (docs/metal.md); they follow from the kernels' cost. torch's C shim
// does not tell the chip, so they do not depend on it. MKRS_MPS_TILE_ROWS (8, 16, 24, 32 or 64) and
// MKRS_MPS_PARTS override the choice, for tuning and so that tests reach every variant.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>

namespace mkrs::mps {

constexpr int64_t kDecodeRows = 1;  // input rows of the kernel that never unpacks
constexpr int64_t kSmallRows = 8;   // ... that unpacks once for all rows; beyond it, matrices

constexpr int64_t kTile = 32;          // outputs and depth of a tile (mps_kernels/gemm.h)
constexpr int64_t kEnoughGroups = 64;  // threadgroups that fill a GPU of 8 to 16 cores
constexpr int64_t kLeastDepth = 256;   // a part of a split sum that still pays for itself

struct MatmulRegime {
  enum class Kind { Decode, Small, Tile } kind = Kind::Decode;
  int64_t tile_rows = 0;  // Tile: input rows of a threadgroup
  int64_t parts = 1;      // how many threadgroups share one sum
};

inline int64_t from_environment(const char* name) {
  const char* text = std::getenv(name);
  return text == nullptr ? 0 : std::atoll(text);
}

inline int64_t parts_for(int64_t groups, int64_t depth) {
  const int64_t forced = from_environment("MKRS_MPS_PARTS");
  const int64_t most = std::max<int64_t>(1, (depth + kTile - 1) / kTile);
  if (forced > 0) return std::min(forced, most);
  const int64_t wanted = kEnoughGroups / std::max<int64_t>(1, groups);
  return std::max<int64_t>(1, std::min({wanted, depth / kLeastDepth, most}));
}

// `rows` input rows, `outputs` values for each, sums over `depth`. Codes are read once up to 64
// rows, and ceil(rows / 64) times beyond.
inline MatmulRegime matmul_regime(int64_t rows, int64_t outputs, int64_t depth) {
  MatmulRegime regime;
  const int64_t forced = from_environment("MKRS_MPS_TILE_ROWS");
  const bool can_force =
      forced == 8 || forced == 16 || forced == 24 || forced == 32 || forced == 64;
  if (!can_force && rows <= kSmallRows) {
    regime.kind = rows <= kDecodeRows ? MatmulRegime::Kind::Decode : MatmulRegime::Kind::Small;
    return regime;
  }
  regime.kind = MatmulRegime::Kind::Tile;
  regime.tile_rows = can_force ? forced : rows > 32 ? 64 : (rows + 7) / 8 * 8;
  const int64_t groups =
      ((outputs + kTile - 1) / kTile) * ((rows + regime.tile_rows - 1) / regime.tile_rows);
  regime.parts = parts_for(groups, depth);
  return regime;
}

}  // namespace mkrs::mps
