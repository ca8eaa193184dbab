// The entry of GPUNETIO on a machine of choice.
#pragma once
#include <memory>

#include "backends/gpunetio/needs.h"
#include "contract/entry.h"

namespace nixl::core::gpunetio {

// Never viable in this release: names everything that is missing, or the data path.
Probe probe(const Machine& machine);

// Refuses with the reason of probe(); where nothing is missing a bad parameter comes first.
Result<std::unique_ptr<Backend>> open(const BackendConfig& config, const Machine& machine);

}  // namespace nixl::core::gpunetio
