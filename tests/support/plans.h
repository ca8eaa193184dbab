// Plans as tests make them: between two regions, block by block.
#pragma once
#include "contract/backend.h"

namespace nixl::core::test {

inline Plan plan_between(Op op, Connection& peer, LocalRegion& local, RemoteRegion& remote) {
  Plan plan;
  plan.op = op;
  plan.peer = &peer;
  plan.local_regions = {&local};
  plan.remote_regions = {&remote};
  return plan;
}

inline void add_block(Plan& plan, std::uint64_t local, std::uint64_t remote, std::uint64_t length,
                      std::uint32_t remote_region = 0) {
  plan.local_address.push_back(local);
  plan.remote_address.push_back(remote);
  plan.length.push_back(length);
  plan.local_region.push_back(0);
  plan.remote_region.push_back(remote_region);
  ++plan.num_blocks;
  plan.total_bytes += length;
}

}  // namespace nixl::core::test
