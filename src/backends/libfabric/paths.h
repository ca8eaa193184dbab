// Which of our rails reaches which of a peer's.
#pragma once
#include <memory>
#include <vector>

#include "backends/libfabric/link.h"

namespace nixl::core::libfabric {

// One path for each rail of the peer that can be reached: over the kernel's network by its routes, else by the names of
// the fabrics. Empty: none.
std::vector<Link::Target> find_paths(const std::vector<std::unique_ptr<Rail>>& rails, const ConnectionBytes& peer);

}  // namespace nixl::core::libfabric
