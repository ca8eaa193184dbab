// Plan: everything one transfer needs, resolved once, in columns; a backend runs over it without look-ups.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base/recycled.h"
#include "contract/memory.h"

namespace nixl::core {

class Connection;
class LocalRegion;
class RemoteRegion;

// Seen from the submitter: kWrite copies local to remote, kRead remote to local.
enum class Op : std::uint8_t { kRead = 0, kWrite = 1 };

// Row i of the columns is a run: count[i] blocks of length[i] bytes. Block b of it lies at local_address[i] + b *
// local_stride[i] and remote_address[i] + b * remote_stride[i]. Plans without runs leave the last three columns empty,
// which stands for count 1. Every block lies inside its regions; the agent has checked that. Order of rows is free for
// the backend, as is merging of neighbours.
struct Plan {
  Op op = Op::kWrite;
  MemKind local_kind = MemKind::kDram;
  MemKind remote_kind = MemKind::kDram;
  Connection* peer = nullptr;  // never null in prepare(); the backend's own object

  RecycledVector<std::uint64_t> local_address, remote_address, length;
  RecycledVector<std::uint32_t> local_region, remote_region;  // indices into the two tables below
  RecycledVector<std::uint64_t> count, local_stride, remote_stride;

  std::vector<LocalRegion*> local_regions;  // distinct regions touched; the backend's own objects
  std::vector<RemoteRegion*> remote_regions;

  std::uint64_t num_blocks = 0;   // sum of count
  std::uint64_t total_bytes = 0;  // sum of count * length

  std::size_t num_rows() const noexcept { return length.size(); }
  bool has_runs() const noexcept { return !count.empty(); }
};

}  // namespace nixl::core
