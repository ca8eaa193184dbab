// Backend GPUNETIO: GPU memory over RDMA, posted by the GPU. In this release it says what the machine lacks for it; the data path is missing.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_gpunetio();

}  // namespace nixl::core
