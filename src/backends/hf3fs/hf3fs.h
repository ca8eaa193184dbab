// HF3FS: files of a mounted 3FS through the user-space rings of its client library (USRBIO), which is opened when first needed.
// Descriptors are those of FILE memory; every file must lie in the mount that the backend was opened for.
#pragma once
#include <span>

#include "contract/entry.h"

namespace nixl::core {

std::span<const BackendEntry> backends_of_hf3fs();

}  // namespace nixl::core
