// Prepared lists: descriptors with the region of each row found, for every backend that could take them.
#pragma once
#include <nixl/descs.h>

#include <memory>
#include <vector>

#include "agent/slot.h"

namespace nixl::core {

template <typename Entry>
struct Resolved {
  Slot* slot = nullptr;
  PeerLink* link = nullptr;  // remote side only
  typename RegionIndex<Entry>::View view;
  Column region;  // a row's place in `view`, or kSpans
};

inline constexpr std::uint32_t kSpans = UINT32_MAX - 1;  // a row that several touching regions hold together

inline MemKind kind_of(const Descs& descs) noexcept {
  return static_cast<MemKind>(descs.type);
}

// One side of transfers. Immutable after it was made; `peer` keeps links and entries alive.
struct PreparedList {
  Descs descs;
  bool local = false;
  std::shared_ptr<Peer> peer;              // remote side: whose memory
  std::vector<Resolved<LocalEntry>> ours;  // local side, in creation order
  std::vector<Resolved<RemoteEntry>> theirs;
  bool spans = false;                      // some row of some side is kSpans
  std::vector<std::uint64_t> first_block;  // with runs: number of the first block of each row, and the total

  std::uint64_t num_blocks() const noexcept { return first_block.empty() ? descs.rows() : first_block.back(); }
};

struct Block {
  std::uint64_t address, length;
  std::size_t row;
};

// Row and address of block `i`; no bounds check.
Block block_at(const PreparedList& list, std::uint64_t i) noexcept;

// kNotFound naming the first descriptor that no region of any allowed backend holds; kInvalidArgument when none ever could be the
// far side. `allowed` in creation order.
Result<PreparedList> prepare_local(Descs descs, const std::vector<Slot*>& allowed);
Result<PreparedList> prepare_remote(Descs descs, std::shared_ptr<Peer> peer, const std::vector<Slot*>& allowed);

// "descriptor 3 (addr 0x7f.., len 64, dev 0, DRAM_SEG)"
std::string describe(const Descs& descs, std::size_t row);
// "(asked: UCX, POSIX)", for errors that no backend of `slots` could help.
std::string asked(const std::vector<Slot*>& slots);

}  // namespace nixl::core
