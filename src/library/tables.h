// The tables of what is linked in; tables.cc is written by the build from the lists of nixl_backend and the stores.
#pragma once
#include <span>
#include <vector>

#include "agent/catalog.h"

namespace nixl::core {

std::vector<BackendEntry> builtin_backends();
std::vector<StoreEntry> builtin_stores();
std::span<const KnownBackend> known_backends();  // documented names that may be missing from a build, and why

// The one catalog of the process.
Catalog& process_catalog();
std::string library_directory();

}  // namespace nixl::core
