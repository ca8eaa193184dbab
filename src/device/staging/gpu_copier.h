// GPU memory by way of pinned host buffers, for what cannot take it in place: files, volumes, sockets.
#pragma once
#include "base/copier.h"

namespace nixl::core {

// The copier of one GPU (ordinal as the process sees it); it lives as long as the process. kUnsupported: there is no
// driver or no GPU, and why; kInvalidArgument: there are fewer GPUs.
Result<Copier*> gpu_copier(std::uint64_t gpu);

}  // namespace nixl::core
