#include "agent/plugin.h"

#include <dlfcn.h>
#include <nixl/backend.h>

#include <exception>

#include "base/log.h"

namespace nixl::core {
namespace {

// Calls of a plug-in, its exceptions turned into errors.
template <typename Call>
auto guarded(const char* what, Call&& call) -> Result<decltype(call())> {
  try {
    if constexpr (std::is_void_v<decltype(call())>) {
      call();
      return {};
    } else {
      return call();
    }
  } catch (const std::exception& error) {
    return fail(Code::kIo, "%s: %s", what, error.what());
  } catch (...) {
    return fail(Code::kInternal, "%s: the plug-in threw something that is no std::exception", what);
  }
}

KindSet kinds_of(const std::vector<MemType>& mems) {
  KindSet kinds;
  for (const MemType mem : mems) kinds.add(static_cast<MemKind>(mem));
  return kinds;
}

PluginRegion outside(const Region& region) {
  return {static_cast<MemType>(region.kind), region.address, region.length, region.device, region.meta};
}

// Objects of the plug-in, given back when ours are destroyed.
struct Line final : Connection {
  nixl::Backend* plugin = nullptr;
  void* peer = nullptr;
  ~Line() override {
    (void)guarded("disconnect", [this] { plugin->disconnect(peer); });
  }
};
struct Held final : LocalRegion {
  nixl::Backend* plugin = nullptr;
  void* memory = nullptr;
  ~Held() override {
    (void)guarded("deregisterMemory", [this] { plugin->deregisterMemory(memory); });
  }
};
struct Seen final : RemoteRegion {
  nixl::Backend* plugin = nullptr;
  void* memory = nullptr;
  ~Seen() override {
    (void)guarded("unloadRemoteMemory", [this] { plugin->unloadRemoteMemory(memory); });
  }
};

class PluginTransfer final : public Transfer {
 public:
  PluginTransfer(nixl::Backend& plugin, void* transfer, std::string name)
      : plugin_(plugin), transfer_(transfer), name_(std::move(name)) {}
  ~PluginTransfer() override {
    (void)guarded("releaseTransfer", [this] { plugin_.releaseTransfer(transfer_); });
  }

  Result<TransferState> submit(std::optional<std::string_view> message) override {
    cancelled_ = false;
    const std::string text(message.value_or(""));
    return kept(guarded("postTransfer", [&] { return plugin_.postTransfer(transfer_, message ? &text : nullptr); }));
  }
  Result<TransferState> poll() override {
    if (cancelled_) return fail(Code::kCancelled, "cancelled");
    if (ended_) return *ended_;
    return kept(guarded("checkTransfer", [this] { return plugin_.checkTransfer(transfer_); }));
  }
  bool cancel() noexcept override {
    if (ended_) return true;
    const auto stopped = guarded("cancelTransfer", [this] { return plugin_.cancelTransfer(transfer_); });
    cancelled_ = stopped && *stopped;
    return cancelled_;
  }
  std::string path() const override { return name_; }

 private:
  Result<TransferState> kept(Result<PluginState> state) {
    ended_.reset();
    if (state && *state == PluginState::Running) return TransferState::kRunning;
    ended_ = state ? Result<TransferState>(TransferState::kDone) : Result<TransferState>(fail(state.error()));
    return *ended_;
  }
  nixl::Backend& plugin_;
  void* const transfer_;
  const std::string name_;
  std::optional<Result<TransferState>> ended_;
  bool cancelled_ = false;
};

class PluginBackend final : public Backend, private Notifier, private MemoryQuery {
 public:
  PluginBackend(std::unique_ptr<nixl::Backend> plugin, std::string name)
      : plugin_(std::move(plugin)), name_(std::move(name)) {
    const KindSet kinds = kinds_of(plugin_->getSupportedMems());
    abilities_ = {kinds, kinds, plugin_->supportsRemote(), plugin_->supportsLocal(), false};
    notifies_ = plugin_->supportsNotif();
  }
  const Abilities& abilities() const noexcept override { return abilities_; }

  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override {
    NIXL_ASSIGN(void* memory, guarded("registerMemory", [&] { return plugin_->registerMemory(outside(region)); }));
    auto held = std::make_unique<Held>();
    held->plugin = plugin_.get();
    held->memory = memory;
    return held;
  }
  Result<std::string> export_region(const LocalRegion& region) override {
    return guarded("publicKey", [&] { return plugin_->publicKey(static_cast<const Held&>(region).memory); });
  }
  Result<std::unique_ptr<RemoteRegion>> import_region(Connection& peer, const Region& region,
                                                      std::string_view key) override {
    return seen(guarded("loadRemoteMemory", [&] {
      return plugin_->loadRemoteMemory(static_cast<Line&>(peer).peer, outside(region), std::string(key));
    }));
  }
  Result<std::unique_ptr<RemoteRegion>> loopback_region(Connection&, const Region& region,
                                                        LocalRegion& local) override {
    return seen(guarded("loadLocalMemory",
                        [&] { return plugin_->loadLocalMemory(static_cast<Held&>(local).memory, outside(region)); }));
  }
  Result<std::string> export_connection() override {
    return guarded("getConnInfo", [this] { return plugin_->getConnInfo(); });
  }
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view bytes) override {
    NIXL_ASSIGN(void* made, guarded("connect", [&] { return plugin_->connect(peer.name, std::string(bytes)); }));
    auto line = std::make_unique<Line>();
    line->plugin = plugin_.get();
    line->peer = made;
    return line;
  }
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override {
    std::vector<PluginPiece> pieces;
    for (std::size_t row = 0; row < plan.num_rows(); ++row)
      for (std::uint64_t block = 0; block < (plan.has_runs() ? plan.count[row] : 1); ++block)
        pieces.push_back({plan.local_address[row] + (block ? block * plan.local_stride[row] : 0),
                          plan.remote_address[row] + (block ? block * plan.remote_stride[row] : 0), plan.length[row],
                          static_cast<Held*>(plan.local_regions[plan.local_region[row]])->memory,
                          static_cast<Seen*>(plan.remote_regions[plan.remote_region[row]])->memory});
    NIXL_ASSIGN(void* made, guarded("prepareTransfer", [&] {
                  return plugin_->prepareTransfer(plan.op == Op::kWrite, static_cast<Line*>(plan.peer)->peer,
                                                  std::move(pieces));
                }));
    return std::make_unique<PluginTransfer>(*plugin_, made, name_);
  }
  bool progress() noexcept override {
    const auto any = guarded("progress", [this] { return plugin_->progress(); });
    return any && *any;
  }
  Notifier* notifier() noexcept override { return notifies_ ? this : nullptr; }
  Result<void> send(Connection& peer, std::string_view message) override {
    return guarded("sendNotif", [&] { plugin_->sendNotif(static_cast<Line&>(peer).peer, std::string(message)); });
  }
  void drain(std::vector<Notification>& out) override {
    auto fresh = guarded("drainNotifs", [this] { return plugin_->drainNotifs(); });
    if (!fresh) {
      NIXL_WARN("plug-in %s: %s", name_.c_str(), fresh.error().reason.c_str());
      return;
    }
    for (auto& [sender, message] : *fresh) out.push_back({std::move(sender), std::move(message)});
  }
  MemoryQuery* memory_query() noexcept override { return this; }
  Result<std::vector<std::optional<Params>>> query(std::span<const Region> regions) override {
    std::vector<PluginRegion> list;
    for (const Region& region : regions) list.push_back(outside(region));
    NIXL_ASSIGN(const auto answers, guarded("queryMemory", [&] { return plugin_->queryMemory(list); }));
    if (!answers) return fail(Code::kUnsupported, "plug-in %s answers no queries about memory", name_.c_str());
    std::vector<std::optional<Params>> out;
    for (const auto& answer : *answers)
      out.push_back(answer ? std::optional<Params>({answer->begin(), answer->end()}) : std::nullopt);
    return out;
  }

 private:
  Result<std::unique_ptr<RemoteRegion>> seen(Result<void*> memory) {
    if (!memory) return fail(memory.error());
    auto region = std::make_unique<Seen>();
    region->plugin = plugin_.get();
    region->memory = *memory;
    return region;
  }
  std::unique_ptr<nixl::Backend> plugin_;
  const std::string name_;
  Abilities abilities_;
  bool notifies_ = false;
};

BackendEntry entry_of(const PluginDescription& description, const std::string& name) {
  BackendEntry entry;
  entry.name = name;
  for (const auto& [key, value] : description.params()) entry.params[key] = value;
  entry.kinds = kinds_of(description.mems());
  entry.remote = description.remote;
  entry.local = description.local;
  entry.notifications = description.notif;
  entry.probe = [&description] {
    const auto reason = guarded("probe", [&] { return description.probe(); });
    if (!reason) return Probe{false, reason.error().reason, {}};
    if (!reason->empty()) return Probe{false, *reason, {}};
    return Probe{true, "", kinds_of(description.mems())};
  };
  entry.open = [&description, name](BackendConfig config) -> Result<std::unique_ptr<Backend>> {
    PluginInit init{config.self.name, {config.params.begin(), config.params.end()}, config.progress_thread};
    NIXL_ASSIGN(auto made, guarded("creation", [&] { return description.create(init); }));
    if (!made) return fail(Code::kIo, "the plug-in created nothing");
    return std::make_unique<PluginBackend>(std::move(made), name);
  };
  return entry;
}

template <typename Seen>
tl::unexpected<Error> wrong_build(const Seen& seen, int api, const char* tag) {
  return fail(Code::kMismatch, "it was built for API %d, '%s'; this library has API %d, '%s'", seen.api, seen.tag, api,
              tag);
}

}  // namespace

Result<LoadedPlugin> load_plugin(const std::string& path, const std::string& name) {
  void* file = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!file) return fail(Code::kIo, "%s", dlerror());
  if (const auto entry = reinterpret_cast<const Module* (*)()>(dlsym(file, "nixl_module"))) {
    const Module* module = entry();
    if (module->api != kModuleApi || std::string_view(module->tag) != kModuleTag)
      return wrong_build(*module, kModuleApi, kModuleTag);
    return LoadedPlugin{{module->backends.begin(), module->backends.end()},
                        {module->stores.begin(), module->stores.end()}};
  }
  if (const auto entry = reinterpret_cast<const PluginDescription* (*)()>(dlsym(file, "nixl_backend_plugin"))) {
    const PluginDescription* description = entry();
    if (description->api != kPluginApi || std::string_view(description->tag) != kPluginTag)
      return wrong_build(*description, kPluginApi, kPluginTag);
    return LoadedPlugin{{entry_of(*description, name)}, {}};
  }
  return fail(Code::kNotFound,
              "it exports neither nixl_backend_plugin nor nixl_module; does it say NIXL_BACKEND_PLUGIN(Class)?");
}

}  // namespace nixl::core
