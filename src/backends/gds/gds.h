// GDS and GDS_MT: files and GPU memory through cuFile (gpu_queue.h), files and host memory through the kernel
// (fileio/engine.h). GDS uses cuFile's batches for large lists, GDS_MT only threads.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_gds();

}  // namespace nixl::core
