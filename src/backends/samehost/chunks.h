// A plan cut into chunks: bounded stretches that threads take one by one and copy with one system call each.
#pragma once
#include <sys/uio.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "contract/plan.h"

namespace nixl::core::samehost {

inline constexpr std::size_t kMaxPieces = 256;            // of a chunk
inline constexpr std::uint64_t kMaxChunkBytes = 1 << 20;  // about 80 us of copying

// A place in a plan: byte `offset` of block `block` of row `row`.
struct Position {
  std::size_t row = 0;
  std::uint64_t block = 0, offset = 0;
  bool operator==(const Position&) const = default;
};

// Where each chunk begins, and one past the end. An empty plan has no chunk. Neighbouring blocks count apart.
std::vector<Position> cut(const Plan& plan);

// The pieces of one chunk, neighbours joined. `regions`: distinct remote regions in order of appearance (repeats only
// when rows alternate).
struct Pieces {
  std::array<iovec, kMaxPieces> local, remote;
  std::array<std::uint32_t, kMaxPieces> regions;
  std::size_t count = 0, num_regions = 0;
};
// `deltas`, if not null: for each remote region, what is added to its addresses.
void gather(const Plan& plan, Position from, Position to, Pieces& out, const std::uint64_t* deltas = nullptr) noexcept;

}  // namespace nixl::core::samehost
