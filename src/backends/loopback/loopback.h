// The reference backend of one process; see loopback.cc for its fault plan.
#pragma once
#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_loopback();

}  // namespace nixl::core
