// The LIBFABRIC backend as the agent sees it.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "backends/libfabric/callers.h"
#include "backends/libfabric/link.h"
#include "backends/libfabric/regions.h"
#include "backends/libfabric/transfer.h"
#include "backends/network/sleeper.h"
#include "contract/backend.h"

namespace nixl::core::libfabric {

class FabricBackend;

class FabricConnection final : public Connection {
 public:
  FabricConnection(FabricBackend& backend, PeerId peer) : backend_(&backend), peer_(std::move(peer)) {}
  ~FabricConnection() override;
  Result<void> wait_ready(Deadline deadline) override;
  const PeerId& peer() const noexcept { return peer_; }
  Link* link() const noexcept { return link_.get(); }  // null: our own agent

 private:
  friend class FabricBackend;
  FabricBackend* const backend_;
  const PeerId peer_;
  std::unique_ptr<Link> link_;
};

class FabricBackend final : public Backend, public Notifier, private Receiver, private LinkOwner {
 public:
  static Result<std::unique_ptr<Backend>> open(BackendConfig config, bool have_gpu);
  ~FabricBackend() override;

  const Abilities& abilities() const noexcept override { return abilities_; }
  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override;
  Result<std::string> export_region(const LocalRegion& region) override;
  Result<std::unique_ptr<RemoteRegion>> import_region(Connection& peer, const Region& region,
                                                      std::string_view key) override;
  Result<std::string> export_connection() override;
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view bytes) override;
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override;
  bool progress() noexcept override;
  int event_fd() const noexcept override { return agents_.event_fd(); }
  bool arm() noexcept override;
  Notifier* notifier() noexcept override { return this; }

  Result<void> send(Connection& peer, std::string_view message) override;
  void drain(std::vector<Notification>& out) override;

 private:
  friend class FabricConnection;
  FabricBackend() = default;
  Result<void> start();
  void run_own_thread();
  void wake() noexcept;
  void release_region(const Registered& region);
  void close_connection(FabricConnection& connection);

  void received_locked(Rail& rail, std::string_view bytes) override;
  Nanoseconds tick_locked(Nanoseconds now, Nanoseconds late) override;
  void link_lost_locked(Link& link) override;
  bool surely_gone(const PeerId& peer) const override;
  Result<void> handle_locked(Rail& rail, std::string_view bytes);
  Result<void> handle_word_locked(MessageKind kind, std::string_view bytes);
  void dismiss_locked(std::uint64_t incarnation);

  BackendConfig config_;
  Abilities abilities_;
  Link::Settings settings_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Callers> callers_;
  network::ImportedTable imported_;
  std::unordered_map<std::uint64_t, Link*> links_;  // by id, under the engine's lock
  std::vector<std::string> revoked_;                // messages for callers whose link broke, under the engine's lock
  std::vector<Notification> arrived_;               // under the engine's lock
  std::atomic<bool> any_arrived_{false};

  network::Sleeper agents_, own_;  // the agent's thread, and that of num_threads
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace nixl::core::libfabric
