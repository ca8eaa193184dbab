// Backends: what there is on this machine, and the interface of plug-ins built outside the tree.
//
// A plug-in is a shared library libplugin_<NAME>.so in NIXL_PLUGIN_DIR that derives a class from nixl::Backend and says
// NIXL_BACKEND_PLUGIN(Class) once. C++ types cross the border, so library and plug-in need the same compiler family and ABI;
// that is checked when it is loaded.
#pragma once
#include <nixl/descs.h>
#include <nixl/export.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace nixl {

struct BackendInfo {
  std::string name;
  std::string version;
  std::vector<MemType> mems;  // usable here; documented ones when not available
  bool local = false, remote = false, notif = false, available = false;
  std::string reason;                                   // why not available, and what to install or set
  std::unordered_map<std::string, std::string> params;  // name and default
  bool lists_params = true;                             // get_plugin_params shows them
  std::string threads_param;                            // parameter that the agent's num_threads sets
  std::string file;                                     // the module it comes from; empty: built in
};

NIXL_EXPORT std::vector<BackendInfo> listBackends();
// The same of one backend, by its name or an alias; the libraries that the others need are not touched. nullopt: there is none.
NIXL_EXPORT std::optional<BackendInfo> describeBackend(const std::string& name);
// The canonical spelling of a backend's name or alias; unknown names come back unchanged.
NIXL_EXPORT std::string canonicalBackend(const std::string& name);
// Where libnixl.so and its plug-ins lie.
NIXL_EXPORT std::string libraryDirectory();
NIXL_EXPORT std::string pluginDirectory();

// ---- the plug-in interface

inline constexpr int kPluginApi = 1;

enum class PluginState : int { Done = 0, Running = 1 };

// One registered piece of memory, as its owner gave it.
struct PluginRegion {
  MemType type = MemType::DRAM;
  std::uint64_t addr = 0, len = 0, dev = 0;
  std::string meta;
};

// One row of a transfer. `local` and `remote` are what registerMemory and loadRemoteMemory returned.
struct PluginPiece {
  std::uint64_t local_addr = 0, remote_addr = 0, len = 0;
  void* local = nullptr;
  void* remote = nullptr;
};

struct PluginInit {
  std::string agent;
  std::unordered_map<std::string, std::string> params;
  bool progress_thread = true;
};

// Functions report failure by throwing an exception derived from std::exception; its text reaches the user. Calls on one
// transfer are serialised, and so are registration and connection calls; all others may come from several threads at once.
// Nothing blocks on a peer.
class Backend {
 public:
  virtual ~Backend() = default;

  // Capabilities; constant. A backend that reaches other agents has notifications.
  virtual bool supportsLocal() const = 0;
  virtual bool supportsRemote() const = 0;
  virtual bool supportsNotif() const = 0;
  virtual std::vector<MemType> getSupportedMems() const = 0;

  // Connections. getConnInfo: constant bytes by which others reach us. connect returns what stands for the peer.
  virtual std::string getConnInfo() { return {}; }
  virtual void* connect(const std::string& agent, const std::string& conn_info) = 0;
  virtual void disconnect(void* peer) = 0;

  // Memory. publicKey: bytes that a peer gives to loadRemoteMemory. loadLocalMemory: our own region as target of our own transfers.
  virtual void* registerMemory(const PluginRegion& region) = 0;
  virtual void deregisterMemory(void* memory) = 0;
  virtual std::string publicKey(void*) { return {}; }
  virtual void* loadRemoteMemory(void* /*peer*/, const PluginRegion&, const std::string& /*key*/) {
    throw std::logic_error("this backend does not reach other agents");
  }
  virtual void* loadLocalMemory(void* /*memory*/, const PluginRegion&) {
    throw std::logic_error("this backend serves no transfers of an agent with itself");
  }
  virtual void unloadRemoteMemory(void*) {}

  // Transfers: prepared once, posted many times. The notification leaves after all data of its post. cancel: true when nothing
  // of the post touches memory any more.
  virtual void* prepareTransfer(bool write, void* peer, std::vector<PluginPiece> pieces) = 0;
  virtual PluginState postTransfer(void* transfer, const std::string* notif) = 0;
  virtual PluginState checkTransfer(void* transfer) = 0;
  virtual bool cancelTransfer(void* transfer) = 0;
  virtual void releaseTransfer(void* transfer) = 0;
  virtual bool progress() { return false; }

  // Notifications.
  virtual void sendNotif(void* /*peer*/, const std::string&) {
    throw std::logic_error("this backend has no notifications");
  }
  virtual std::vector<std::pair<std::string, std::string>> drainNotifs() { return {}; }  // sender, message

  // Optional; nullopt: cannot answer. An entry is nullopt when the file or object is absent.
  using Answers = std::vector<std::optional<std::unordered_map<std::string, std::string>>>;
  virtual std::optional<Answers> queryMemory(const std::vector<PluginRegion>&) { return std::nullopt; }
};

// What a plug-in's entry point hands over. Everything lives as long as the library is loaded.
struct PluginDescription {
  int api = kPluginApi;
  const char* tag = "";
  const char* version = "";
  // Empty: it can work here; else one line saying what is missing.
  std::string (*probe)() = nullptr;
  std::unordered_map<std::string, std::string> (*params)() = nullptr;
  std::unique_ptr<Backend> (*create)(const PluginInit& init) = nullptr;
  // Capabilities without an instance, for listings.
  std::vector<MemType> (*mems)() = nullptr;
  bool remote = false, local = false, notif = false;
};

#define NIXL_TAG_TEXT2(x) #x
#define NIXL_TAG_TEXT(x) NIXL_TAG_TEXT2(x)
#if defined(_GLIBCXX_USE_CXX11_ABI)
#define NIXL_TAG_LIBRARY "libstdc++ cxx11abi " NIXL_TAG_TEXT(_GLIBCXX_USE_CXX11_ABI)
#else
#define NIXL_TAG_LIBRARY "other library"
#endif
// g++ and clang++ with libstdc++ share one ABI.
inline constexpr const char* kPluginTag = "itanium " NIXL_TAG_LIBRARY;

}  // namespace nixl

// Defines the entry point. Class has static members: `std::string probe()`, `std::unordered_map<std::string, std::string> params()`,
// `std::vector<nixl::MemType> mems()`, `constexpr bool kRemote, kLocal, kNotif`, `constexpr const char* kVersion`, and a constructor
// taking const nixl::PluginInit&.
#define NIXL_BACKEND_PLUGIN(Class)                                                                                    \
  extern "C" NIXL_EXPORT const nixl::PluginDescription* nixl_backend_plugin() {                                       \
    static const nixl::PluginDescription description{                                                                 \
        nixl::kPluginApi,                                                                                             \
        nixl::kPluginTag,                                                                                             \
        Class::kVersion,                                                                                              \
        &Class::probe,                                                                                                \
        &Class::params,                                                                                               \
        [](const nixl::PluginInit& init) -> std::unique_ptr<nixl::Backend> { return std::make_unique<Class>(init); }, \
        &Class::mems,                                                                                                 \
        Class::kRemote,                                                                                               \
        Class::kLocal,                                                                                                \
        Class::kNotif};                                                                                               \
    return &description;                                                                                              \
  }
