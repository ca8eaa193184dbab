// POSIX: files through the kernel. What queues, cuts and continues the I/O is fileio/engine.h; here are the
// descriptors, the parameters and the transfers.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_posix();

}  // namespace nixl::core
