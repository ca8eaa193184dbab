// GUSLI: block volumes. Files and kernel block devices are served here, through the kernel (fileio/engine.h); volumes
// of a network server need the vendor's client library, which this build does not drive.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_gusli();

}  // namespace nixl::core
