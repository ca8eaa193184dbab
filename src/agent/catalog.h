// Catalog: every backend there is, built in, in our modules, or found in plug-in directories; what each needs; whether it can
// work here. One catalog a process is enough; all functions may be called from any threads.
#pragma once
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "contract/entry.h"

namespace nixl::core {

// What the documentation promises of a backend that is not in this build.
struct KnownBackend {
  const char* name;
  KindSet kinds;
  bool remote, local, notifications;
  const char* reason;  // why it is not here
  Params params = {};
  const char* alias = nullptr;
};

struct PluginReport {
  std::string name, reason, file;  // file: the module, or empty
  bool available = false, remote = false, local = false, notifications = false;
  KindSet kinds;  // usable now if available, else documented
  Params params;
  bool lists_params = true;
  bool stands_in = false;  // not asked for by name
  std::string threads_param;
};

class Catalog {
 public:
  // `builtin`: linked in. `known`: backends to report besides. Modules lie in `module_dir`/libplugin_*.so.
  Catalog(std::vector<BackendEntry> builtin, std::vector<StoreEntry> stores, std::span<const KnownBackend> known,
          std::string module_dir);
  ~Catalog();

  // Looks for modules again: in `module_dir` and NIXL_PLUGIN_DIR as it is now. A bad directory hides nothing: it is a warning.
  void refresh();

  // Accepts aliases. kNotFound with what is wrong and what to do. Entries live as long as the catalog.
  Result<const BackendEntry*> find(const std::string& name);
  std::string canonical(const std::string& name);  // unknown names unchanged
  std::vector<const BackendEntry*> entries();      // all that are here, viable or not
  Probe probe(const BackendEntry& entry);
  std::vector<std::string> viable();  // names users may create now
  std::vector<PluginReport> report(std::string_view only = {});
  const StoreEntry* store(const std::string& name);
  // Entries that stand in for `name`.
  std::vector<const BackendEntry*> stand_ins(const std::string& name);

 private:
  struct Item {
    BackendEntry entry;
    std::string file;
    bool loaded = true;
    std::string failure;  // why the module could not be loaded
  };
  void scan(const std::string& directory, bool warn);
  void load(const std::string& path, const std::string& name);
  Item* item(const std::string& name);
  const KnownBackend* known(const std::string& name) const;

  mutable std::recursive_mutex mutex_;
  std::vector<std::unique_ptr<Item>> items_;
  std::vector<StoreEntry> stores_;
  std::span<const KnownBackend> known_;
  const std::string module_dir_;
  std::vector<std::string> seen_files_;
};

}  // namespace nixl::core
