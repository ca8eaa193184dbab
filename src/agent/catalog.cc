#include "agent/catalog.h"

#include <dlfcn.h>

#include <algorithm>
#include <filesystem>

#include "agent/plugin.h"
#include "base/env.h"
#include "base/log.h"

namespace nixl::core {
namespace {
constexpr std::string_view kPrefix = "libplugin_", kSuffix = ".so";
}

Catalog::Catalog(std::vector<BackendEntry> builtin, std::vector<StoreEntry> stores, std::span<const KnownBackend> known,
                 std::string module_dir)
    : stores_(std::move(stores)), known_(known), module_dir_(std::move(module_dir)) {
  for (BackendEntry& entry : builtin) {
    auto item = std::make_unique<Item>();
    item->entry = std::move(entry);
    items_.push_back(std::move(item));
  }
  refresh();
}

Catalog::~Catalog() = default;  // modules stay loaded: their objects may outlive us

void Catalog::refresh() {
  const std::lock_guard lock(mutex_);
  scan(module_dir_, false);
  if (const auto extra = env_text("NIXL_PLUGIN_DIR"); extra && *extra != module_dir_) scan(*extra, true);
}

void Catalog::scan(const std::string& directory, bool warn) {
  namespace fs = std::filesystem;
  std::error_code error;
  fs::directory_iterator files(directory, error);
  if (error) {
    if (warn && std::find(seen_files_.begin(), seen_files_.end(), directory) == seen_files_.end()) {
      seen_files_.push_back(directory);
      NIXL_WARN("NIXL_PLUGIN_DIR=%s: %s; no plug-ins are loaded from there", directory.c_str(),
                error.message().c_str());
    }
    return;
  }
  std::vector<std::string> names;
  for (const auto& file : files) names.push_back(file.path().filename().string());
  std::sort(names.begin(), names.end());
  for (const std::string& file : names) {
    if (!file.starts_with(kPrefix) || !file.ends_with(kSuffix)) continue;
    const std::string path = (fs::path(directory) / file).string();
    if (std::find(seen_files_.begin(), seen_files_.end(), path) != seen_files_.end()) continue;
    seen_files_.push_back(path);
    load(path, file.substr(kPrefix.size(), file.size() - kPrefix.size() - kSuffix.size()));
  }
}

void Catalog::load(const std::string& path, const std::string& name) {
  auto loaded = load_plugin(path, name);
  if (!loaded) {
    NIXL_WARN("plug-in %s is not used: %s", path.c_str(), loaded.error().reason.c_str());
    if (item(name)) return;
    auto broken = std::make_unique<Item>();
    broken->entry.name = name;
    broken->file = path;
    broken->failure = loaded.error().reason;
    items_.push_back(std::move(broken));
    return;
  }
  for (BackendEntry& entry : loaded->backends) {
    if (item(entry.name)) {
      NIXL_WARN("plug-in %s: backend %s exists already and is kept", path.c_str(), entry.name.c_str());
      continue;
    }
    auto fresh = std::make_unique<Item>();
    fresh->entry = std::move(entry);
    fresh->file = path;
    items_.push_back(std::move(fresh));
  }
  for (StoreEntry& entry : loaded->stores)
    if (!store(entry.name)) stores_.push_back(std::move(entry));
}

Catalog::Item* Catalog::item(const std::string& name) {
  for (const auto& candidate : items_) {
    const BackendEntry& entry = candidate->entry;
    if (entry.name == name || std::find(entry.aliases.begin(), entry.aliases.end(), name) != entry.aliases.end())
      return candidate.get();
  }
  return nullptr;
}

const KnownBackend* Catalog::known(const std::string& name) const {
  for (const KnownBackend& candidate : known_)
    if (candidate.name == name || (candidate.alias && candidate.alias == name)) return &candidate;
  return nullptr;
}

Result<const BackendEntry*> Catalog::find(const std::string& name) {
  const std::lock_guard lock(mutex_);
  if (Item* found = item(name)) {
    if (!found->failure.empty()) return fail(Code::kNotFound, "backend %s: %s", name.c_str(), found->failure.c_str());
    if (const Probe seen = probe(found->entry); !seen.viable)
      return fail(Code::kNotFound, "backend %s is not available: %s", name.c_str(), seen.reason.c_str());
    return &found->entry;
  }
  if (const KnownBackend* absent = known(name))
    return fail(Code::kNotFound, "backend %s is not available: %s", absent->name, absent->reason);
  std::string have;
  for (const std::string& viable_name : viable()) have += (have.empty() ? "" : " ") + viable_name;
  return fail(Code::kNotFound, "there is no backend '%s'; available: %s", name.c_str(),
              have.empty() ? "none" : have.c_str());
}

std::string Catalog::canonical(const std::string& name) {
  const std::lock_guard lock(mutex_);
  if (const Item* found = item(name)) return found->entry.name;
  const KnownBackend* absent = known(name);
  return absent ? absent->name : name;
}

std::vector<const BackendEntry*> Catalog::entries() {
  const std::lock_guard lock(mutex_);
  std::vector<const BackendEntry*> list;
  for (const auto& held : items_)
    if (held->failure.empty()) list.push_back(&held->entry);
  return list;
}

Probe Catalog::probe(const BackendEntry& entry) {
  return entry.probe();
}

std::vector<std::string> Catalog::viable() {
  std::vector<std::string> names;
  for (const BackendEntry* entry : entries())
    if (entry->stands_in_for.empty() && probe(*entry).viable) names.push_back(entry->name);
  return names;
}

std::vector<const BackendEntry*> Catalog::stand_ins(const std::string& name) {
  std::vector<const BackendEntry*> list;
  for (const BackendEntry* entry : entries())
    if (std::find(entry->stands_in_for.begin(), entry->stands_in_for.end(), name) != entry->stands_in_for.end())
      list.push_back(entry);
  return list;
}

const StoreEntry* Catalog::store(const std::string& name) {
  const std::lock_guard lock(mutex_);
  for (const StoreEntry& entry : stores_)
    if (entry.name == name) return &entry;
  return nullptr;
}

std::vector<PluginReport> Catalog::report(std::string_view only) {
  const std::lock_guard lock(mutex_);
  std::vector<PluginReport> list;
  const auto asked = [only](const std::string& name) { return only.empty() || name == only; };
  for (const auto& held : items_) {
    if (!asked(held->entry.name)) continue;
    PluginReport line;
    line.name = held->entry.name;
    line.file = held->file;
    line.remote = held->entry.remote;
    line.local = held->entry.local;
    line.notifications = held->entry.notifications;
    line.kinds = held->entry.kinds;
    line.params = held->entry.params;
    line.lists_params = held->entry.list_params;
    line.stands_in = !held->entry.stands_in_for.empty();
    line.threads_param = held->entry.threads_param;
    line.reason = held->failure;
    if (held->failure.empty()) {
      const Probe seen = probe(held->entry);
      line.available = seen.viable;
      line.reason = seen.reason;
      if (seen.viable) line.kinds = seen.kinds;
    }
    list.push_back(std::move(line));
  }
  for (const KnownBackend& absent : known_) {
    if (!asked(absent.name) || item(absent.name)) continue;
    PluginReport line;
    line.name = absent.name;
    line.reason = absent.reason;
    line.remote = absent.remote;
    line.local = absent.local;
    line.notifications = absent.notifications;
    line.kinds = absent.kinds;
    line.params = absent.params;
    list.push_back(std::move(line));
  }
  return list;
}

}  // namespace nixl::core
