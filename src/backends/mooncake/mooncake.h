// Backend Mooncake: DRAM and GPU memory of peers through the Mooncake transfer engine, over TCP or RDMA.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_mooncake();

}  // namespace nixl::core
