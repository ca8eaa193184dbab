// LIBFABRIC in the table of backends.
#pragma once
#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_libfabric();

}  // namespace nixl::core
