// Loopback: the reference backend. Agents of one process copy memory with memmove. It is the smallest complete example of
// contract/backend.h, and its fault plan lets tests see late, failing, reordered and refused transfers at will:
//   delay_us      a submission finishes no earlier than this
//   fail_nth      the nth submission fails (counted from 1 over the life of the backend)
//   reorder       waiting submissions finish last in, first out
//   drop_nth      the nth message is lost
//   max_running   submissions above this many answer kAgain
//   lose_nth      the nth submission loses its peer
#include "backends/loopback/loopback.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#include "base/bytes.h"
#include "base/env.h"
#include "base/fd.h"

namespace nixl::core {
namespace {

struct Cell {  // a registered region, shared by its owner and those who imported it
  Region region;
  std::atomic<bool> alive{true};
};

struct Port {  // where an agent receives; found by incarnation
  PeerId self;
  Fd wake;
  std::atomic<bool> open{true};
  std::mutex mutex;
  std::vector<Notification> inbox;
  std::map<std::uint64_t, std::shared_ptr<Cell>> cells;
  std::uint64_t next_key = 1;

  void signal() noexcept { eventfd_write(wake.get(), 1); }
};

struct Switchboard {
  std::mutex mutex;
  std::map<std::uint64_t, std::shared_ptr<Port>> ports;
};
Switchboard& switchboard() {
  static Switchboard* const board = new Switchboard;  // outlives agents destroyed at exit
  return *board;
}

struct Line final : Connection {
  std::shared_ptr<Port> port;
  PeerId peer;
  bool reported = false;
};
struct OwnRegion final : LocalRegion {
  std::shared_ptr<Port> port;
  std::shared_ptr<Cell> cell;
  std::uint64_t key = 0;
  ~OwnRegion() override {
    cell->alive = false;
    const std::lock_guard lock(port->mutex);
    port->cells.erase(key);
  }
};
struct PeerRegion final : RemoteRegion {
  std::shared_ptr<Cell> cell;
};

struct Faults {
  std::int64_t delay_us = 0, fail_nth = 0, drop_nth = 0, max_running = 0, lose_nth = 0;
  bool reorder = false;
};

class Loopback;

class Copy final : public Transfer {
 public:
  Copy(Loopback& owner, Plan plan) : owner_(owner), plan_(std::move(plan)) {}
  Result<TransferState> submit(std::optional<std::string_view> message) override;
  Result<TransferState> poll() override;
  bool cancel() noexcept override;
  std::string path() const override { return "memcpy"; }

 private:
  friend class Loopback;
  Result<TransferState> run();

  Loopback& owner_;
  const Plan plan_;
  std::optional<std::string> message_;
  Nanoseconds ready_at_ = 0;
  bool running_ = false;
  std::optional<Error> error_ = Error{Code::kNotPosted, "never submitted"};
};

class Loopback final : public Backend, private Notifier {
 public:
  Loopback(BackendConfig config, Faults faults, Fd wake) : config_(std::move(config)), faults_(faults) {
    port_ = std::make_shared<Port>();
    port_->self = config_.self;
    port_->wake = std::move(wake);
    Switchboard& board = switchboard();
    const std::lock_guard lock(board.mutex);
    board.ports[config_.self.incarnation] = port_;
  }
  ~Loopback() override {
    Switchboard& board = switchboard();
    const std::lock_guard lock(board.mutex);
    port_->open = false;
    board.ports.erase(config_.self.incarnation);
    for (auto& [id, port] : board.ports) port->signal();
  }

  const Abilities& abilities() const noexcept override {
    static const Abilities kAbilities{{MemKind::kDram}, {MemKind::kDram}, true, true, true};
    return kAbilities;
  }

  Result<std::unique_ptr<LocalRegion>> add_region(const Region& region) override {
    auto own = std::make_unique<OwnRegion>();
    own->port = port_;
    own->cell = std::make_shared<Cell>();
    own->cell->region = region;
    const std::lock_guard lock(port_->mutex);
    own->key = port_->next_key++;
    port_->cells[own->key] = own->cell;
    return own;
  }
  Result<std::string> export_region(const LocalRegion& region) override {
    ByteWriter out;
    out.put(static_cast<const OwnRegion&>(region).key);
    return out.take();
  }
  Result<std::unique_ptr<RemoteRegion>> import_region(Connection& connection, const Region& region,
                                                      std::string_view bytes) override {
    auto& line = static_cast<Line&>(connection);
    ByteReader in(bytes);
    NIXL_ASSIGN(const auto key, in.get<std::uint64_t>());
    const std::lock_guard lock(line.port->mutex);
    const auto found = line.port->cells.find(key);
    const auto cell = found == line.port->cells.end() ? nullptr : found->second;
    if (!cell || cell->region.address != region.address || cell->region.length != region.length)
      return fail(Code::kNotFound, "agent '%s' has no region with key %llu", line.peer.name.c_str(),
                  static_cast<unsigned long long>(key));
    auto imported = std::make_unique<PeerRegion>();
    imported->cell = cell;
    return imported;
  }

  Result<std::string> export_connection() override {
    ByteWriter out;
    out.put<std::uint64_t>(static_cast<std::uint64_t>(getpid()));
    out.put(config_.self.incarnation);
    return out.take();
  }
  Result<std::unique_ptr<Connection>> connect(const PeerId& peer, std::string_view bytes) override {
    ByteReader in(bytes);
    NIXL_ASSIGN(const auto process, in.get<std::uint64_t>());
    NIXL_ASSIGN(const auto incarnation, in.get<std::uint64_t>());
    if (process != static_cast<std::uint64_t>(getpid()))
      return fail(Code::kUnsupported, "agent '%s' lives in another process", peer.name.c_str());
    Switchboard& board = switchboard();
    const std::lock_guard lock(board.mutex);
    const auto found = board.ports.find(incarnation);
    if (found == board.ports.end()) return fail(Code::kPeerLost, "agent '%s' is gone", peer.name.c_str());
    auto line = std::make_unique<Line>();
    line->port = found->second;
    line->peer = peer;
    return line;
  }

  Result<std::unique_ptr<Transfer>> prepare(Plan plan) override {
    if (plan.local_kind != MemKind::kDram || plan.remote_kind != MemKind::kDram)
      return fail(Code::kInvalidArgument, "loopback moves DRAM_SEG, not %s to %s", name(plan.local_kind),
                  name(plan.remote_kind));
    return std::make_unique<Copy>(*this, std::move(plan));
  }

  bool progress() noexcept override {
    eventfd_t ignored;
    eventfd_read(port_->wake.get(), &ignored);
    const std::lock_guard lock(mutex_);
    return finish_due();
  }
  int event_fd() const noexcept override { return port_->wake.get(); }
  bool arm() noexcept override {
    const std::lock_guard lock(mutex_);
    return running_.empty();
  }

  Notifier* notifier() noexcept override { return this; }
  Result<void> send(Connection& peer, std::string_view message) override {
    auto& line = static_cast<Line&>(peer);
    if (!line.port->open) return lost(line);
    if (++num_messages_ == faults_.drop_nth) return {};
    {
      const std::lock_guard lock(line.port->mutex);
      line.port->inbox.push_back({config_.self.name, std::string(message)});
    }
    line.port->signal();
    return {};
  }
  void drain(std::vector<Notification>& out) override {
    {
      const std::lock_guard lock(mutex_);
      finish_due();
    }
    const std::lock_guard lock(port_->mutex);
    std::move(port_->inbox.begin(), port_->inbox.end(), std::back_inserter(out));
    port_->inbox.clear();
  }

 private:
  friend class Copy;

  tl::unexpected<Error> lost(Line& line) {
    Error why{Code::kPeerLost, "agent '" + line.peer.name + "' is gone"};
    if (!std::exchange(line.reported, true) && config_.events) config_.events->peer_lost(line.peer, why);
    return fail(std::move(why));
  }
  bool finish_due() {  // mutex_ held
    const Nanoseconds now = now_ns();
    bool any = false;
    std::vector<Copy*> due;
    for (Copy* copy : running_)
      if (copy->ready_at_ <= now) due.push_back(copy);
    if (faults_.reorder) std::reverse(due.begin(), due.end());
    for (Copy* copy : due) {
      (void)copy->run();  // kept in the transfer, told by poll()
      any = true;
    }
    return any;
  }

  const BackendConfig config_;
  const Faults faults_;
  std::shared_ptr<Port> port_;
  std::mutex mutex_;  // submissions; copies run under it, so that after cancel() nothing is touched
  std::vector<Copy*> running_;
  std::int64_t num_submitted_ = 0;
  std::atomic<std::int64_t> num_messages_{0};
};

Result<TransferState> Copy::submit(std::optional<std::string_view> message) {
  const std::lock_guard lock(owner_.mutex_);
  const Faults& faults = owner_.faults_;
  if (faults.max_running && static_cast<std::int64_t>(owner_.running_.size()) >= faults.max_running)
    return fail(Code::kAgain, "max_running is %lld", static_cast<long long>(faults.max_running));
  message_ = message ? std::optional<std::string>(*message) : std::nullopt;
  error_.reset();
  const std::int64_t nth = ++owner_.num_submitted_;
  auto& line = static_cast<Line&>(*plan_.peer);
  if (nth == faults.lose_nth) line.port->open = false;
  if (nth == faults.fail_nth) {
    error_ = Error{Code::kIo, "submission " + std::to_string(nth) + " fails by the fault plan"};
    return fail(*error_);
  }
  running_ = true;
  owner_.running_.push_back(this);
  ready_at_ = now_ns() + faults.delay_us * 1000;
  return faults.delay_us ? Result<TransferState>(TransferState::kRunning) : run();
}

Result<TransferState> Copy::poll() {
  const std::lock_guard lock(owner_.mutex_);
  if (running_) owner_.finish_due();
  if (running_) return TransferState::kRunning;
  if (error_) return fail(*error_);
  return TransferState::kDone;
}

bool Copy::cancel() noexcept {
  const std::lock_guard lock(owner_.mutex_);
  if (running_) {
    std::erase(owner_.running_, this);
    running_ = false;
    error_ = Error{Code::kCancelled, "cancelled"};
  }
  return true;
}

Result<TransferState> Copy::run() {  // owner's mutex held
  std::erase(owner_.running_, this);
  running_ = false;
  auto& line = static_cast<Line&>(*plan_.peer);
  const auto failed = [&](Error why) {
    error_ = why;
    return fail(std::move(why));
  };
  if (!line.port->open) return failed(owner_.lost(line).value());
  for (RemoteRegion* region : plan_.remote_regions)
    if (!static_cast<PeerRegion*>(region)->cell->alive)
      return failed({Code::kIo, "agent '" + line.peer.name + "' deregistered a region of this transfer"});
  for (std::size_t row = 0; row < plan_.num_rows(); ++row) {
    const std::uint64_t count = plan_.has_runs() ? plan_.count[row] : 1;
    for (std::uint64_t block = 0; block < count; ++block) {
      auto* local = reinterpret_cast<char*>(plan_.local_address[row] + (block ? block * plan_.local_stride[row] : 0));
      auto* remote =
          reinterpret_cast<char*>(plan_.remote_address[row] + (block ? block * plan_.remote_stride[row] : 0));
      std::memmove(plan_.op == Op::kWrite ? remote : local, plan_.op == Op::kWrite ? local : remote, plan_.length[row]);
    }
  }
  if (message_)
    if (auto sent = owner_.send(line, *message_); !sent) return failed(sent.error());
  return TransferState::kDone;
}

Result<std::int64_t> count_param(const Params& params, const char* key) {
  const auto found = params.find(key);
  if (found == params.end() || found->second.empty()) return 0;
  const auto value = parse_int(found->second);
  if (!value || *value < 0)
    return fail(Code::kInvalidArgument, "LOOPBACK parameter %s is '%s': a number >= 0 is needed", key,
                found->second.c_str());
  return *value;
}

Result<std::unique_ptr<Backend>> open_loopback(BackendConfig config) {
  Faults faults;
  NIXL_ASSIGN(faults.delay_us, count_param(config.params, "delay_us"));
  NIXL_ASSIGN(faults.fail_nth, count_param(config.params, "fail_nth"));
  NIXL_ASSIGN(faults.drop_nth, count_param(config.params, "drop_nth"));
  NIXL_ASSIGN(faults.max_running, count_param(config.params, "max_running"));
  NIXL_ASSIGN(faults.lose_nth, count_param(config.params, "lose_nth"));
  const std::string& reorder = config.params["reorder"];
  faults.reorder = !reorder.empty() && parse_bool(reorder).value_or(false);
  Fd wake(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!wake) return fail(errno_error("eventfd", errno));
  return std::make_unique<Loopback>(std::move(config), faults, std::move(wake));
}

Probe probe_loopback() {
  const auto wanted = env_bool("NIXL_LOOPBACK");
  if (wanted && wanted->value_or(false)) return {true, "", {MemKind::kDram}};
  return {false, "reference backend for tests inside one process; set NIXL_LOOPBACK=y to use it", {}};
}

}  // namespace

std::span<const BackendEntry> backends_of_loopback() {
  static const std::vector<BackendEntry> kEntries = [] {
    BackendEntry entry;
    entry.name = "LOOPBACK";
    entry.params = {{"delay_us", "0"}, {"drop_nth", "0"},    {"fail_nth", "0"},
                    {"lose_nth", "0"}, {"max_running", "0"}, {"reorder", "false"}};
    entry.kinds = {MemKind::kDram};
    entry.remote = entry.local = entry.notifications = true;
    entry.probe = probe_loopback;
    entry.open = open_loopback;
    return std::vector<BackendEntry>{entry};
  }();
  return kEntries;
}

}  // namespace nixl::core
