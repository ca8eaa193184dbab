#include <dlfcn.h>
#include <nixl/backend.h>
#include <nixl/version.h>

#include <filesystem>

#include "tables.h"

namespace nixl {
namespace core {

std::string library_directory() {
  Dl_info here{};
  dladdr(reinterpret_cast<const void*>(&nixl::version), &here);
  std::error_code error;
  const auto path = std::filesystem::canonical(here.dli_fname ? here.dli_fname : "", error);
  return error ? std::string(".") : path.parent_path().string();
}

Catalog& process_catalog() {
  static Catalog* const catalog =  // agents may be destroyed at exit, after every static object
      new Catalog(builtin_backends(), builtin_stores(), known_backends(), library_directory() + "/plugins");
  return *catalog;
}

static std::vector<BackendInfo> describe_backends(std::string_view only) {
  Catalog& catalog = process_catalog();
  catalog.refresh();
  std::vector<BackendInfo> list;
  for (const PluginReport& line : catalog.report(only)) {
    BackendInfo info;
    info.name = line.name;
    info.version = version();
    for (int kind = 0; kind < kNumMemKinds; ++kind)
      if (line.kinds.has(static_cast<MemKind>(kind))) info.mems.push_back(static_cast<MemType>(kind));
    info.local = line.local;
    info.remote = line.remote;
    info.notif = line.notifications;
    info.available = line.available;
    info.reason = line.reason;
    info.params = {line.params.begin(), line.params.end()};
    info.lists_params = line.lists_params;
    info.threads_param = line.threads_param;
    info.file = line.file;
    list.push_back(std::move(info));
  }
  return list;
}

}  // namespace core

std::vector<BackendInfo> listBackends() {
  return core::describe_backends({});
}
std::optional<BackendInfo> describeBackend(const std::string& name) {
  if (name.empty()) return std::nullopt;
  std::vector<BackendInfo> found = core::describe_backends(canonicalBackend(name));
  if (found.empty()) return std::nullopt;
  return std::move(found.front());
}

std::string canonicalBackend(const std::string& name) {
  return core::process_catalog().canonical(name);
}
std::string libraryDirectory() {
  return core::library_directory();
}
std::string pluginDirectory() {
  return core::library_directory() + "/plugins";
}

}  // namespace nixl
