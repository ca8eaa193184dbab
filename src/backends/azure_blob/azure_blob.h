// AZURE_BLOB: block blobs of one container. The moving is http/objects.h, the requests are azure.h.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_azure_blob();

}  // namespace nixl::core
