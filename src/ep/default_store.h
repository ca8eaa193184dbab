// The store of buffers that were given none. Which stores exist is known above this layer: the library sets it when it
// is loaded.
#pragma once
#include <memory>

#include "contract/store.h"

namespace nixl::core::ep {

// Null when none is configured; an error when one is and cannot be opened.
using OpenDefaultStore = Result<std::shared_ptr<Store>> (*)();
void set_default_store(OpenDefaultStore open) noexcept;

}  // namespace nixl::core::ep
