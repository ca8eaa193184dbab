// Agent: the whole of what nixl does for one name, in terms of Result; the C++ and Python faces are thin on it.
//
// Threads: everything may be called from any threads at any time, except destruction. Nothing here waits for a peer but
// connect(), wait() of a request and the discovery of unknown names, all with a deadline.
#pragma once
#include <nixl/descs.h>

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <shared_mutex>
#include <span>
#include <string>
#include <vector>

#include "agent/catalog.h"
#include "agent/handles.h"
#include "agent/lists.h"
#include "agent/metadata.h"
#include "agent/request.h"
#include "agent/runtime.h"
#include "base/fork.h"

namespace nixl::core {

class Exchange;

// Every live incarnation of this process, so that an agent re-made under an old name is recognised at once.
void enter_census(std::uint64_t incarnation);
void leave_census(std::uint64_t incarnation);

struct AgentOptions {
  std::string name;
  bool progress_thread = true;
  bool listen = false;
  std::uint16_t listen_port = 8888;  // 0: any free one
  std::optional<bool> use_etcd;      // nullopt: explicit calls use it when the environment names one
  bool capture_telemetry = false;
  Nanoseconds watch_timeout_ns = 5'000'000'000;
};

using BackendIds = std::span<const std::uint32_t>;  // empty: every backend

class Agent {
 public:
  static Result<std::unique_ptr<Agent>> open(AgentOptions options, Catalog& catalog);
  ~Agent();  // at most five seconds, also with dead peers
  const std::string& name() const noexcept { return options_.name; }

  Result<std::uint32_t> create_backend(const std::string& name, const Params& params);
  Slot* slot(std::uint32_t id) const;
  Slot* slot(const std::string& name) const;

  Result<void> register_memory(const Descs& descs, BackendIds backends);
  Result<void> deregister_memory(const Descs& descs, BackendIds backends);
  Result<std::vector<std::optional<Params>>> query_memory(const Descs& descs, std::uint32_t backend);

  // Lists and requests are handed out as numbers. `agent` empty: the local side.
  Result<std::uint64_t> prepare_list(const std::string& agent, Descs descs, BackendIds backends);
  Result<void> release_list(std::uint64_t list);
  Result<std::uint64_t> make_request(Op op, std::uint64_t local, std::span<const std::int64_t> local_index,
                                     std::uint64_t remote, std::span<const std::int64_t> remote_index,
                                     std::optional<std::string> message, BackendIds backends, bool merge);
  Result<std::uint64_t> make_request(Op op, Descs local, Descs remote, const std::string& agent,
                                     std::optional<std::string> message, BackendIds backends);
  Result<std::shared_ptr<Request>> request(std::uint64_t handle) const;  // kInvalidArgument when unknown
  Result<void> release_request(std::uint64_t handle);                    // unknown: nothing to do
  bool telemetry_on() const noexcept { return telemetry_ != nullptr; }

  Result<void> send_notification(const std::string& agent, std::string_view message, BackendIds backends);
  Result<std::vector<Notification>> drain_notifications(BackendIds backends);

  Result<std::string> metadata() const;
  Result<std::string> partial_metadata(const Descs& descs, bool connections, BackendIds backends) const;
  Result<std::string> load(std::string_view bytes);  // the peer's name
  Result<void> remove(const std::string& agent);
  // kNotFound: unknown agent, or a descriptor that is not covered.
  Result<void> check_peer(const std::string& agent, const Descs* descs);
  Result<void> connect(const std::string& agent, BackendIds backends, Nanoseconds timeout_ns);

  // Exchange by sockets (ip given) or the configured store. All return at once.
  Result<void> send_metadata(const std::string& ip, std::uint16_t port);
  Result<void> send_partial(const Descs& descs, bool connections, BackendIds backends, const std::string& ip,
                            std::uint16_t port, const std::string& label);
  Result<void> fetch(const std::string& agent, const std::string& ip, std::uint16_t port, const std::string& label);
  Result<void> invalidate(const std::string& ip, std::uint16_t port);
  std::uint16_t listen_port() const noexcept;  // 0: not listening

  Result<int> event_fd() { return runtime_->event_fd(); }
  Catalog& catalog() const noexcept { return catalog_; }
  // In the child of a fork: threads and devices belong to the parent. All calls are refused, and the agent must not be destroyed.
  bool is_elsewhere() const noexcept { return birthplace_.is_elsewhere(); }

 private:
  Agent(AgentOptions options, Catalog& catalog);
  Result<void> start();
  Result<void> usable() const;
  std::vector<Slot*> slots() const;
  Result<std::vector<Slot*>> chosen(BackendIds backends, bool with_companions) const;
  Result<Slot*> open_slot(const BackendEntry& entry, Params params, bool companion);
  void add_companion(Slot& owner, const std::vector<const BackendEntry*>& candidates);
  Result<Params> full_params(const BackendEntry& entry, const Params& given) const;

  Result<void> register_in(Slot& slot, const Descs& descs);
  Result<void> register_one(Slot& slot, const Region& region);
  void deregister_one(Slot& slot, const Region& region);
  bool holds_all(Slot& slot, const Descs& descs) const;

  std::shared_ptr<Peer> listed_peer(const std::string& agent) const;  // also one that is lost and not yet forgotten
  std::shared_ptr<Peer> known_peer(const std::string& agent) const;
  Result<std::shared_ptr<Peer>> peer(const std::string& agent);  // discovers when that is on
  Result<PreparedList> remote_list(const std::string& agent, const Descs& descs, const std::vector<Slot*>& allowed);
  Result<std::shared_ptr<Peer>> admit(Metadata data);
  void forget(const std::shared_ptr<Peer>& peer, Peer::State state, const std::string& reason);
  void on_lost(const Runtime::Options::Loss& loss);
  bool process_gone(const PeerId& peer) const;
  Result<std::uint64_t> add_request(Op op, const PreparedList& remote, const Route& route, BuiltPlan built,
                                    std::optional<std::string> message);
  Result<void> send_to(Peer& peer, std::string_view message, const std::vector<Slot*>& allowed);
  BackendInfo info_of(Slot& slot, bool connection) const;
  Metadata envelope() const;  // changes_mutex_ is held
  Result<Metadata> full_metadata() const;
  Result<Metadata> some_metadata(const Descs& descs, bool connections, BackendIds backends) const;
  void memory_changed();

  const AgentOptions options_;
  Catalog& catalog_;
  const std::uint64_t incarnation_;
  const Home home_ = home_of_this_process();
  const Birthplace birthplace_;
  std::unique_ptr<Telemetry> telemetry_;
  Tracer* tracer_ = nullptr;  // null: off
  std::unique_ptr<Runtime> runtime_;
  std::unique_ptr<Exchange> exchange_;

  mutable std::shared_mutex mutex_;  // slots_ and peers_; never held around a backend's call
  std::vector<std::unique_ptr<Slot>> slots_;
  std::map<std::string, std::shared_ptr<Peer>> peers_;
  std::shared_ptr<Peer> self_;

  // Held while a backend or region comes into the tables or leaves them, and while these are read for metadata; taken before mutex_.
  mutable std::mutex changes_mutex_;
  std::uint64_t revision_ = 0;  // number of such changes

  mutable std::mutex registry_mutex_;  // one registration, deregistration or creation at a time
  std::mutex load_mutex_;              // one peer is loaded at a time
  Handles<PreparedList, HandleKind::kList> lists_;
  Handles<Request, HandleKind::kRequest> requests_;
};

}  // namespace nixl::core
