// The UCX backend as the agent sees it.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backends/network/sleeper.h"
#include "backends/ucx/driver.h"
#include "backends/ucx/inbox.h"
#include "backends/ucx/link.h"
#include "backends/ucx/read_service.h"
#include "backends/ucx/regions.h"
#include "backends/ucx/transfer.h"
#include "contract/backend.h"

namespace nixl::core::ucx {

class UcxBackend;

class UcxConnection final : public Connection {
 public:
  UcxConnection(UcxBackend& backend, PeerId peer) : backend_(&backend), peer_(std::move(peer)) {}
  ~UcxConnection() override;
  Result<void> wait_ready(Deadline deadline) override;

  const PeerId& peer() const noexcept { return peer_; }
  Link& link(std::size_t worker) const { return *links_[worker]; }

 private:
  friend class UcxBackend;
  UcxBackend* const backend_;
  const PeerId peer_;
  std::vector<std::unique_ptr<Link>> links_;  // one a worker
  std::atomic<bool> reported_{false};
};

class UcxTransfer final : public Transfer {
 public:
  UcxTransfer(UcxBackend& backend, std::string path) : backend_(&backend), path_(std::move(path)) {}
  ~UcxTransfer() override;
  void add_lane_locked(Plan plan, Link& link, ReadRequests& requests, std::uint64_t caller_incarnation);
  Result<TransferState> submit(std::optional<std::string_view> message) override;
  Result<TransferState> poll() override;
  bool cancel() noexcept override;
  std::string path() const override { return path_; }
  Link& link() const noexcept { return lanes_.front()->link(); }
  std::uint64_t total_bytes() const noexcept { return total_bytes_; }

 private:
  Result<TransferState> answer() const;
  bool running() const noexcept;
  UcxBackend* const backend_;
  Shares shares_;
  std::vector<std::unique_ptr<Lane>> lanes_;  // at least one, each on a worker of its own
  std::vector<Worker*> workers_;              // theirs; the links may be gone before us, and after a close the workers
  std::vector<std::shared_ptr<std::mutex>> doors_;  // of the workers
  const std::string path_;
  std::uint64_t total_bytes_ = 0;
};

class UcxBackend final : public Backend, public Notifier, public CostModel, private Receiver {
 public:
  // `engines` > 0: the device number of a descriptor chooses one of so many workers (UCX_MO).
  static Result<std::unique_ptr<Backend>> open(BackendConfig config, KindSet kinds, int engines);
  ~UcxBackend() override;

  const Abilities& abilities() const noexcept override { return abilities_; }
  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override;
  Result<std::string> export_region(const LocalRegion& region) override;
  Result<std::unique_ptr<RemoteRegion>> import_region(Connection& peer, const Region& region,
                                                      std::string_view key) override;
  Result<std::string> export_connection() override;
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view bytes) override;
  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override;
  bool progress() noexcept override;
  int event_fd() const noexcept override { return sleeper_.event_fd(); }
  bool arm() noexcept override;
  Notifier* notifier() noexcept override { return this; }
  CostModel* cost_model() noexcept override { return this; }

  Result<void> send(Connection& peer, std::string_view message) override;
  void drain(std::vector<Notification>& out) override;
  Result<CostEstimate> estimate(const Transfer& transfer) override;

  // Wakes whoever drives this worker: there is work that no event announces.
  void wake(const Worker& worker) noexcept;

 private:
  friend class UcxConnection;
  // What lives on one worker besides UCX's own objects; guarded by the worker's lock.
  struct Desk {
    std::unique_ptr<Worker> worker;
    std::unordered_map<std::uint64_t, Link*> calling;  // by link id: where answers to our hellos belong
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::unique_ptr<Link>>
        answering;  // by the caller's (incarnation, link)
    std::vector<std::unique_ptr<Link>> ended_links;
    std::vector<std::unique_ptr<ReadService>> services;
    ReadRequests requests;
    bool driven = false;  // by a thread of its own; otherwise by progress()
    std::unique_ptr<Driver> driver;
  };

  UcxBackend() = default;
  Result<void> start(int num_workers);
  Result<void> start_drivers();
  Result<void> open_sleeper();
  std::size_t choose_worker(const Plan& plan);
  std::size_t num_shares(const Plan& plan) const noexcept;
  Result<void> check_device(const Region& region) const;
  void release_region(Exposed& region);
  void close_connection(UcxConnection& connection);

  void received_locked(Worker& worker, MessageId id, std::string_view bytes) override;
  void link_lost_locked(Link& link, const Error& why) override;
  bool surely_gone(const Link& link) const override;
  void job_ended_locked(Worker& worker) override;
  void settled_locked(Worker& worker) override;
  Result<void> handle_locked(Desk& desk, MessageId id, std::string_view bytes);
  Result<void> answer_hello_locked(Desk& desk, const Hello& hello);
  Result<void> serve_read_locked(Desk& desk, std::string_view bytes);
  void dismiss_locked(Desk& desk, const Bye& bye);

  BackendConfig config_;
  Options options_;
  Abilities abilities_;
  int engines_ = 0;
  Link::Caller caller_;
  std::unique_ptr<Context> context_;
  std::vector<Desk> desks_;  // one a worker
  ExposedTable exposed_;
  network::ImportedTable imported_;
  Inbox inbox_;
  std::mutex connections_mutex_;
  std::unordered_map<const Link*, UcxConnection*> owners_;  // of the links in Desk::calling
  std::atomic<unsigned> round_robin_{0};

  network::Sleeper sleeper_;  // the agent's thread
};

}  // namespace nixl::core::ucx
