// Table entries: how a backend or store is found, described and opened. A folder src/backends/NAME defines
//     std::span<const nixl::core::BackendEntry> nixl::core::backends_of_NAME();
// and src/stores/NAME defines
//     const nixl::core::StoreEntry& nixl::core::store_NAME();
// The build collects them into the tables of the library; a MODULE exports the same entries through `nixl_module` below.
#pragma once
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "contract/backend.h"
#include "contract/store.h"

namespace nixl::core {

// Can it work here? `kinds`: what is usable on this machine now (no VRAM without a driver). Not viable: one line that says what
// was looked for, where, and what to install or set. Probing takes milliseconds, starts no thread, initialises no device.
struct Probe {
  bool viable = false;
  std::string reason;  // may also hold a remark when viable
  KindSet kinds;
};

struct BackendEntry {
  std::string name;                  // as listed: "UCX", "GDS_MT"
  std::vector<std::string> aliases;  // accepted besides
  Params params;                     // every known parameter and its default ("" = unset)
  std::string param_prefix;          // keys starting with it are passed on unchecked ("UCX_"); empty: none
  bool list_params = true;           // false: get_plugin_params shows {}
  KindSet kinds;                     // what it supports where everything is present
  bool remote = false, local = false, notifications = false;
  std::string threads_param;          // parameter that the agent's num_threads sets; empty: none
  std::vector<std::string> excludes;  // may not be in one agent with these
  // Not asked for by name: opened beside the first of these that an agent creates, and preferred for peers it can connect to
  // and regions it accepted; `params` are set by the other's parameters of the same names. Off when the environment variable
  // `off_env` or the other's parameter `off_param` says no.
  std::vector<std::string> stands_in_for;
  std::string off_env, off_param;

  std::function<Probe()> probe;
  // Bad parameter value: kInvalidArgument naming it; device or server refuses: kIo with the vendor's text.
  std::function<Result<std::unique_ptr<Backend>>(BackendConfig config)> open;
};

struct StoreEntry {
  std::string name;  // "etcd", "tcp", "memory"
  Result<std::unique_ptr<Store>> (*open)(StoreConfig config) = nullptr;
};

// What a module of this project exports as extern "C" const nixl::core::Module* nixl_module(). Types of C++ cross this border,
// so `tag` must equal the loader's own.
inline constexpr int kModuleApi = 1;
#define NIXL_MODULE_TAG_TEXT2(x) #x
#define NIXL_MODULE_TAG_TEXT(x) NIXL_MODULE_TAG_TEXT2(x)
#if defined(__clang__)
#define NIXL_MODULE_COMPILER "clang"
#else
#define NIXL_MODULE_COMPILER "gcc"
#endif
inline constexpr const char* kModuleTag =
    NIXL_MODULE_COMPILER " abi " NIXL_MODULE_TAG_TEXT(__GXX_ABI_VERSION) " c++ " NIXL_MODULE_TAG_TEXT(__cplusplus);

struct Module {
  int api = kModuleApi;
  const char* tag = kModuleTag;
  std::span<const BackendEntry> backends;
  std::span<const StoreEntry> stores;
};

}  // namespace nixl::core
