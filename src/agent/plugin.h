// Loads a plug-in file: a module of this project (nixl_module) or one built against <nixl/backend.h> (nixl_backend_plugin).
#pragma once
#include <string>
#include <vector>

#include "contract/entry.h"

namespace nixl::core {

struct LoadedPlugin {
  std::vector<BackendEntry> backends;
  std::vector<StoreEntry> stores;
};

// kMismatch for a wrong API number or compiler tag (both values in the text), kNotFound for a missing entry point, kIo with the
// loader's text. The file stays loaded for the life of the process.
Result<LoadedPlugin> load_plugin(const std::string& path, const std::string& name);

}  // namespace nixl::core
