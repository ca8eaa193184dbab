// OBJ: objects of S3 and of servers that speak it. The moving is http/objects.h, the requests are s3.h; here are the
// descriptors, the parameters and the transfers.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_obj();

}  // namespace nixl::core
