// Backend: the one interface between the agent and whatever moves bytes. Headers only; the agent sees backends through this
// file alone, and a backend sees nothing of the agent but `Events`.
//
// THREADS. Any function may be called from any thread, several at a time, with these exceptions that the agent promises:
//   - calls on one Transfer are serialised;
//   - set-up calls of one backend (add_region, import_region, connect, export_*, prepare, and the destruction of regions and
//     connections) are serialised among themselves unless Abilities::concurrent_setup; they do run beside submit, poll,
//     cancel, progress and the Notifier;
//   - the agent holds no lock of its own that an `Events` call takes while it is inside a backend.
// BLOCKING. Nothing waits for a peer or a device, except Connection::wait_ready. Bounded work inline (copies up to about
//   100 us) is fine anywhere. The destructors of Connection and Backend may take up to a second when peers are gone.
// OWNERSHIP. Regions, connections and transfers are objects of the backend, owned by the agent; destroying one releases what
//   it stands for and reports nothing. The agent destroys in this order: transfers, remote regions, connections, local
//   regions, backend. One exception: a Transfer that is NOT running may outlive the regions and the connection of its plan
//   (a user keeps the handle); it will never be submitted again, and its destructor must not touch them.
// ERRORS. Code and reason as in base/result.h, with the vendor's code and text in the reason. An error belongs to the request
//   it happened to. A dead peer is kPeerLost.
#pragma once
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/result.h"
#include "contract/memory.h"
#include "contract/plan.h"

namespace nixl::core {

// What a backend can do; constant after it was opened.
struct Abilities {
  // What can be the local side of a transfer, and the remote one. kVram counts also where it is moved through host memory: the
  // path says "staged" then.
  KindSet local_kinds;
  KindSet remote_kinds;
  bool remote = false;  // reaches other agents: export_*, import_region and connect(other) work, notifier() exists
  bool local = false;   // serves transfers of an agent with itself
  bool concurrent_setup = false;  // see THREADS
  KindSet registrable() const noexcept { return local_kinds | remote_kinds; }
};

// A region registered here. The agent destroys it when it is deregistered and no running transfer uses it; from then on a
// peer's access must fail at that peer where the transport can do that (the key is revoked).
class LocalRegion {
 public:
  virtual ~LocalRegion() = default;
};

// A region of a peer (or of ourselves as loopback target), imported for use in plans.
class RemoteRegion {
 public:
  virtual ~RemoteRegion() = default;
};

// The way to one peer. Destroying it drops everything held for that peer (endpoints, mappings, descriptors, queued messages).
// The agent has cancelled the running transfers of the peer and destroyed its remote regions before.
class Connection {
 public:
  virtual ~Connection() = default;
  // Blocks until the first transfer would pay nothing for wiring up. kTimeout names the peer; kPeerLost when refused.
  virtual Result<void> wait_ready(Deadline) { return {}; }
};

enum class TransferState : std::uint8_t { kRunning, kDone };

// One prepared transfer; submitted any number of times, one submission at a time.
class Transfer {
 public:
  virtual ~Transfer() = default;  // never called while running: the agent has polled it to the end or cancelled it

  // Starts it. kDone: already finished. kAgain: a queue is full and NOTHING was started; the agent tries again later.
  // `message`: attached notification (only when the backend has a Notifier and the peer is another agent), copied if needed.
  // It leaves by itself, exactly once, after every byte of this submission is visible at the target, also if nobody polls
  // (progress() is called); it never leaves when the submission failed or was cancelled.
  virtual Result<TransferState> submit(std::optional<std::string_view> message) = 0;

  // State of the last submission; never blocks; makes all the progress this transfer needs, so that a loop over poll() ends
  // also when nobody calls progress(). kDone means: local memory may be reused, READ data is in place, WRITE data is visible
  // at the target no later than its notification. The first terminal answer is kept: later polls repeat it.
  virtual Result<TransferState> poll() = 0;

  // Asks to stop and never blocks. true: it ended (or was not running); from now on this submission touches no local memory
  // and starts no new access to the peer's. false: something in flight cannot be stopped yet; call again after progress().
  // poll() answers kCancelled afterwards, unless it had already finished.
  virtual bool cancel() noexcept = 0;

  // The path taken, for people: "shm", "cma", "tcp", "rc_mlx5/mlx5_0:1", "cuda_ipc", "io_uring", "staged+libaio" ...
  virtual std::string path() const = 0;
};

struct Notification {
  std::string sender;  // the sending agent's name
  std::string message;
};

// Messages between agents. Both functions may be called from any threads at any time.
// The agent delivers messages to itself on its own: a Notifier is never asked to send to its own agent.
class Notifier {
 public:
  virtual ~Notifier() = default;
  // Takes the message (any bytes, at least 1 MiB) and queues it; messages of one sender arrive in order, each exactly once.
  // Fails only with kPeerLost or, above the limit, kInvalidArgument naming the limit.
  virtual Result<void> send(Connection& peer, std::string_view message) = 0;
  // Appends what has arrived, from known and unknown senders alike, in arrival order per sender; never blocks. Also makes the
  // progress needed to receive, so that a loop over drain() works without a progress thread.
  virtual void drain(std::vector<Notification>& out) = 0;
};

// Answers whether files or objects exist; regions need not be registered. One entry a region, nullopt = absent.
class MemoryQuery {
 public:
  virtual ~MemoryQuery() = default;
  virtual Result<std::vector<std::optional<Params>>> query(std::span<const Region> regions) = 0;
};

struct CostEstimate {
  std::int64_t duration_us = 0;
  std::int64_t error_margin_us = 0;
};

class CostModel {
 public:
  virtual ~CostModel() = default;
  virtual Result<CostEstimate> estimate(const Transfer&) = 0;
};

// Gives kernels direct use of regions. A view is a device-readable table whose layout belongs to the backend.
class DeviceLink {
 public:
  virtual ~DeviceLink() = default;
  virtual Result<std::uint64_t> open_view(std::span<LocalRegion* const>) = 0;
  virtual Result<std::uint64_t> open_view(std::span<RemoteRegion* const>) = 0;
  virtual void close_view(std::uint64_t view) noexcept = 0;
};

// Names one life of one agent: a restarted agent of the same name has another incarnation.
struct PeerId {
  std::string name;
  std::uint64_t incarnation = 0;
};

// What a backend tells its agent. Callable from any thread, also from inside calls of the agent; returns at once.
class Events {
 public:
  virtual ~Events() = default;
  // The peer is dead or unreachable beyond the reconnect time. At most once per Connection. Running transfers to it answer
  // kPeerLost from poll(); the agent then cancels and drops everything of the peer from a thread of its own.
  virtual void peer_lost(const PeerId& peer, Error why) noexcept = 0;
  // As peer_lost, when nobody need be alarmed: the peer said that it goes, or was never spoken to.
  virtual void peer_left(const PeerId& peer, Error why) noexcept { peer_lost(peer, std::move(why)); }
  // Is it certain that the peer's process has ended? Where that cannot be known, no.
  virtual bool surely_gone(const PeerId&) const noexcept { return false; }
};

// Given to open(). `events` outlives the backend.
struct BackendConfig {
  PeerId self;
  Params params;                // defaults of the entry, overwritten by the caller's; values never null
  bool progress_thread = true;  // false: progress happens only inside calls
  Events* events = nullptr;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual const Abilities& abilities() const noexcept = 0;

  // The same region may be added more than once; each call gives its own object.
  virtual Result<std::unique_ptr<LocalRegion>> add_region(const Region&) = 0;
  // Our own region as target of our own transfers (abilities().local). `self` came from connect() with the own name.
  virtual Result<std::unique_ptr<RemoteRegion>> loopback_region(Connection& self, const Region& region,
                                                                LocalRegion& local) {
    NIXL_ASSIGN(const std::string key, export_region(local));
    return import_region(self, region, key);
  }
  // Public key bytes of a region, and their use at a peer. `region` in import is as the owner registered it.
  virtual Result<std::string> export_region(const LocalRegion&) { return std::string(); }
  virtual Result<std::unique_ptr<RemoteRegion>> import_region(Connection&, const Region&, std::string_view /*key*/) {
    return fail(Code::kUnsupported, "this backend does not reach other agents");
  }

  // How others reach us: constant bytes, the same at every call. Empty for backends that are local only.
  virtual Result<std::string> export_connection() { return std::string(); }
  // Makes the peer known; wiring up goes on in the background. The own name with the own bytes when abilities().local.
  // kUnsupported: the peer cannot be reached this way (say, another host): the agent uses another backend and is silent.
  // Bytes of a peer come from outside: check them.
  virtual Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view bytes) = 0;

  // Resolves a plan for submission. Wrong kinds, alignment or peer: kInvalidArgument. The vectors are the backend's to keep.
  virtual Result<std::unique_ptr<Transfer>> prepare(Plan plan) = 0;

  // Drives everything in flight; true when something happened. Never blocks.
  virtual bool progress() noexcept { return false; }
  // Sleeping: a descriptor that polls readable when progress() has work, after arm() answered true. arm() false: there is work
  // now, call progress() first. -1: nothing arrives by itself; progress is needed only while a transfer is running.
  virtual int event_fd() const noexcept { return -1; }
  virtual bool arm() noexcept { return true; }
  // An eventfd on which callers of the agent sleep; open as long as the backend. Where peers can write to it themselves, they
  // do so when a message has come for drain(), instead of waking the thread that sleeps on event_fd().
  virtual void share_callers_event(int /*eventfd*/) noexcept {}

  // Optional abilities; the objects belong to the backend. Constant after open.
  virtual Notifier* notifier() noexcept { return nullptr; }
  virtual MemoryQuery* memory_query() noexcept { return nullptr; }
  virtual CostModel* cost_model() noexcept { return nullptr; }
  virtual DeviceLink* device_link() noexcept { return nullptr; }
};

}  // namespace nixl::core
