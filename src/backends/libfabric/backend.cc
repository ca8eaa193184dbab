#include "backends/libfabric/backend.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <iterator>

#include "backends/libfabric/paths.h"
#include "base/env.h"
#include "base/log.h"

namespace nixl::core::libfabric {
namespace {

constexpr Nanoseconds kMillisecond = 1'000'000;
constexpr Nanoseconds kLinger = 300 * kMillisecond;  // for queued messages when a connection is closed
constexpr Nanoseconds kFarewell = 100 * kMillisecond;
constexpr Nanoseconds kPatienceWithoutThread = 5 * kMillisecond;
constexpr Nanoseconds kLongestGap = 1000 * kMillisecond;  // in which nobody drives us, that counts against peers
constexpr Nanoseconds kPollAfterActivity = 100'000;
constexpr int kMostAsleepMs = 200;
constexpr std::size_t kRevokedKept = 4096;

}  // namespace

Result<std::unique_ptr<Backend>> FabricBackend::open(BackendConfig config, bool have_gpu) {
  std::unique_ptr<FabricBackend> backend(new FabricBackend());
  backend->config_ = std::move(config);
  NIXL_ASSIGN(const Options options, parse_options(backend->config_.params));
  NIXL_ASSIGN(const auto reconnect_ms, env_int("NIXL_RECONNECT_MS"));
  if (reconnect_ms) backend->settings_.reconnect_ns = std::max<std::int64_t>(*reconnect_ms, 0) * kMillisecond;
  backend->settings_.self = backend->config_.self;
  NIXL_ASSIGN(const Api* const api, open_api());
  auto provider = choose_provider(*api, options.provider, have_gpu);
  if (!provider)
    return fail(Code::kInvalidArgument, "LIBFABRIC parameter provider = '%s': %s", options.provider.c_str(),
                provider.error().reason.c_str());
  KindSet served{MemKind::kDram};
  if (provider->device_memory) served.add(MemKind::kVram);
  backend->abilities_ = {.local_kinds = served, .remote_kinds = served, .remote = true, .local = true};
  NIXL_ASSIGN(backend->engine_, Engine::open(*api, options, std::move(*provider), *backend));
  backend->callers_ = std::make_unique<Callers>(*backend->engine_, backend->config_.self.incarnation);
  NIXL_TRY(backend->start());
  return std::unique_ptr<Backend>(std::move(backend));
}

Result<void> FabricBackend::start() {
  const bool own_thread = engine_->options().own_thread;
  NIXL_TRY((own_thread ? own_ : agents_).open("LIBFABRIC", engine_->wait_fds()));
  if (!own_thread) return {};
  NIXL_TRY(agents_.open("LIBFABRIC", {}));
  sigset_t all, before;  // signals are for the program's own threads
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run_own_thread(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "nixl-libfabric");
  return {};
}

void FabricBackend::run_own_thread() {
  Nanoseconds active_at = now_ns();
  while (!stopping_) {
    if (engine_->progress()) {
      active_at = now_ns();
      agents_.note_news();  // transfers may have ended, messages may have come
    }
    if (now_ns() - active_at < kPollAfterActivity) {
      ::sched_yield();
    } else if (own_.arm([this](Deadline& next) { return engine_->arm(next); }) && !stopping_) {
      pollfd wait{own_.event_fd(), POLLIN, 0};
      if (::poll(&wait, 1, kMostAsleepMs) > 0) active_at = now_ns();
    }
  }
}

bool FabricBackend::arm() noexcept {
  return agents_.arm([this](Deadline& next) { return thread_.joinable() || engine_->arm(next); });
}

void FabricBackend::wake() noexcept {
  if (thread_.joinable())
    own_.wake();
  else
    agents_.wake();
}

FabricBackend::~FabricBackend() {
  stopping_ = true;
  if (thread_.joinable()) {
    own_.note_news();
    thread_.join();
  }
  if (!engine_ || !callers_) return;
  const auto guard = engine_->lock();
  (void)engine_->progress_locked();  // who called just now is answered, and told
  callers_->tell_all_locked(encode(MessageKind::kBye, LinkWord{config_.self.incarnation, 0, 0}));
  const Deadline deadline = Deadline::after(kFarewell);
  do (void)engine_->progress_locked();
  while (!callers_->idle_locked() && !deadline.passed());
  callers_.reset();
}

// ---- regions ----

Result<std::unique_ptr<LocalRegion>> FabricBackend::add_region(const Region& region) {
  if (!abilities_.local_kinds.has(region.kind))
    return fail(Code::kInvalidArgument, "LIBFABRIC does not serve %s with provider %s on this machine",
                name(region.kind), engine_->provider().c_str());
  NIXL_ASSIGN(auto registered,
              Registered::open(*engine_, region, [this](const Registered& gone) { release_region(gone); }));
  return registered;
}

// From here on no peer may reach the memory: peers are told, and the keys go right afterwards.
void FabricBackend::release_region(const Registered& region) {
  if (!region.exported) return;
  const std::string message = encode(Revoke{config_.self.incarnation, region.id()});
  const auto guard = engine_->lock();
  callers_->tell_all_locked(message);
  if (revoked_.size() >= kRevokedKept) revoked_.erase(revoked_.begin(), revoked_.begin() + kRevokedKept / 2);
  revoked_.push_back(message);
}

Result<std::string> FabricBackend::export_region(const LocalRegion& region) {
  auto& registered = const_cast<Registered&>(static_cast<const Registered&>(region));
  registered.exported = true;
  return encode(registered.key());
}

Result<std::unique_ptr<RemoteRegion>> FabricBackend::import_region(Connection& peer, const Region& region,
                                                                   std::string_view key) {
  if (!abilities_.remote_kinds.has(region.kind))
    return fail(Code::kUnsupported, "LIBFABRIC does not reach %s with provider %s", name(region.kind),
                engine_->provider().c_str());
  NIXL_ASSIGN(auto imported, Imported::open(key, imported_, static_cast<FabricConnection&>(peer).peer().incarnation));
  return imported;
}

// ---- connections ----

Result<std::string> FabricBackend::export_connection() {
  ConnectionBytes bytes;
  bytes.provider = engine_->provider();
  bytes.address_format = engine_->rails().front()->address_format();
  bytes.driven = config_.progress_thread || engine_->options().own_thread;
  for (const auto& rail : engine_->rails()) bytes.rails.push_back({rail->fabric(), rail->address()});
  return encode(bytes);
}

Result<std::unique_ptr<Connection>> FabricBackend::connect(const PeerId& peer, std::string_view bytes) {
  NIXL_ASSIGN(const ConnectionBytes there, decode_connection(bytes));
  auto connection = std::make_unique<FabricConnection>(*this, peer);
  if (peer.incarnation == config_.self.incarnation && peer.name == config_.self.name) return connection;
  if (there.provider != engine_->provider() || there.address_format != engine_->rails().front()->address_format())
    return fail(Code::kUnsupported,
                "agent '%s' uses provider %s of libfabric, this one %s: set LIBFABRIC's parameter "
                "'provider' to the same on both sides",
                peer.name.c_str(), there.provider.c_str(), engine_->provider().c_str());
  const auto targets = find_paths(engine_->rails(), there);
  if (targets.empty())
    return fail(Code::kIo, "agent '%s' has no device that one of ours reaches over provider %s", peer.name.c_str(),
                engine_->provider().c_str());
  {
    const auto guard = engine_->lock();
    NIXL_ASSIGN(connection->link_, Link::open_locked(*engine_, *this, settings_, peer, there.driven, targets));
    links_.emplace(connection->link_->id(), connection->link_.get());
    NIXL_INFO("agent '%s' is reached through libfabric over %s", peer.name.c_str(),
              connection->link_->describe().c_str());
  }
  wake();
  return connection;
}

void FabricBackend::close_connection(FabricConnection& connection) {
  if (!connection.link_) return;
  const auto guard = engine_->lock();
  connection.link_->close_locked(kLinger);
  links_.erase(connection.link_->id());
  connection.link_.reset();
}

FabricConnection::~FabricConnection() {
  backend_->close_connection(*this);
}

Result<void> FabricConnection::wait_ready(Deadline deadline) {
  if (!link_) return {};
  // Without progress threads the peer may be this very thread's other agent, which answers when it is polled: not
  // waited for.
  const Deadline patience =
      backend_->config_.progress_thread ? deadline : Deadline::after(kPatienceWithoutThread).earlier(deadline);
  for (;;) {
    {
      const auto guard = backend_->engine_->lock();
      (void)backend_->engine_->progress_locked();
      if (link_->state() == Link::State::kReady) return {};
      if (link_->state() == Link::State::kLost) return fail(link_->lost_because());
    }
    if (patience.passed()) {
      if (!backend_->config_.progress_thread && !deadline.passed()) return {};
      return fail(Code::kTimeout, "agent '%s' has not answered over libfabric", peer_.name.c_str());
    }
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
}

void FabricBackend::link_lost_locked(Link& link) {
  if (!config_.events) return;
  if (link.missed_by_none())
    config_.events->peer_left(link.peer(), link.lost_because());
  else
    config_.events->peer_lost(link.peer(), link.lost_because());
}

bool FabricBackend::surely_gone(const PeerId& peer) const {
  return config_.events && config_.events->surely_gone(peer);
}

Nanoseconds FabricBackend::tick_locked(Nanoseconds now, Nanoseconds late) {
  Nanoseconds next = INT64_MAX;
  std::vector<Link*> links;
  for (const auto& [id, link] : links_) links.push_back(link);
  for (Link* const link : links) {
    if (late > kLongestGap) link->excuse_locked(late - kLongestGap);
    next = std::min(next, link->tick_locked(now));
  }
  return std::min(next, callers_->tick_locked(now));
}

// ---- messages ----

void FabricBackend::received_locked(Rail& rail, std::string_view bytes) {
  if (auto handled = handle_locked(rail, bytes); !handled)
    NIXL_WARN("LIBFABRIC: a message of kind %u from another process is dropped: %s",
              static_cast<unsigned char>(bytes[0]), handled.error().reason.c_str());
}

Result<void> FabricBackend::handle_locked(Rail& rail, std::string_view bytes) {
  const auto kind = static_cast<MessageKind>(bytes[0]);
  switch (kind) {
    case MessageKind::kHello: {
      NIXL_ASSIGN(const Hello hello, decode_hello(bytes));
      return callers_->hello_locked(rail, hello, revoked_);
    }
    case MessageKind::kHelloAck: {
      NIXL_ASSIGN(const HelloAck ack, decode_ack(bytes));
      if (const auto found = links_.find(ack.link); found != links_.end()) found->second->acknowledged_locked(ack);
      return {};
    }
    case MessageKind::kNotify: {
      NIXL_ASSIGN(const Notify notify, decode_notify(bytes));
      callers_->notify_locked(notify, arrived_);
      any_arrived_.store(!arrived_.empty(), std::memory_order_release);
      return {};
    }
    case MessageKind::kRevoke: {
      NIXL_ASSIGN(const Revoke revoke, decode_revoke(bytes));
      imported_.revoke(revoke.incarnation, revoke.region);
      return {};
    }
    default:
      return handle_word_locked(kind, bytes);
  }
}

Result<void> FabricBackend::handle_word_locked(MessageKind kind, std::string_view bytes) {
  NIXL_ASSIGN(const LinkWord word, decode_word(bytes));
  switch (kind) {
    case MessageKind::kPing:
      callers_->ping_locked(word);
      return {};
    case MessageKind::kPong:
      if (const auto found = links_.find(word.link); found != links_.end()) found->second->heard_locked();
      return {};
    case MessageKind::kGap:
      if (const auto found = links_.find(word.link); found != links_.end()) found->second->gap_locked();
      return {};
    case MessageKind::kBye:
      dismiss_locked(word.incarnation);
      return {};
    case MessageKind::kClose:
      callers_->close_locked(word);
      return {};
    default:
      return fail(Code::kMismatch, "unknown kind");
  }
}

void FabricBackend::dismiss_locked(std::uint64_t incarnation) {
  std::vector<Link*> gone;
  for (const auto& [id, link] : links_)
    if (link->peer().incarnation == incarnation) gone.push_back(link);
  for (Link* const link : gone) link->dismissed_locked();
}

// ---- transfers, notifications, progress ----

Result<std::unique_ptr<Transfer>> FabricBackend::prepare(Plan plan) {
  if (!abilities_.local_kinds.has(plan.local_kind) || !abilities_.remote_kinds.has(plan.remote_kind))
    return fail(Code::kInvalidArgument, "LIBFABRIC with provider %s does not move %s to %s on this machine",
                engine_->provider().c_str(), name(plan.local_kind), name(plan.remote_kind));
  merge_neighbours(plan);
  const auto wake_up = [this] { wake(); };
  Link* const link = static_cast<FabricConnection&>(*plan.peer).link();
  if (!link) {
    if (plan.local_kind != MemKind::kDram || plan.remote_kind != MemKind::kDram)
      return fail(Code::kUnsupported, "LIBFABRIC moves only DRAM within one agent");
    return std::make_unique<OwnTransfer>(*engine_, std::move(plan), wake_up);
  }
  const auto guard = engine_->lock();
  return std::make_unique<PeerTransfer>(*engine_, *link, std::move(plan), link->describe(), wake_up);
}

Result<void> FabricBackend::send(Connection& peer, std::string_view message) {
  if (message.size() > kMaxNotificationBytes)
    return fail(Code::kInvalidArgument, "notification of %zu bytes, at most %zu are possible", message.size(),
                kMaxNotificationBytes);
  Link* const link = static_cast<FabricConnection&>(peer).link();
  if (!link) return fail(Code::kInvalidArgument, "a notification of an agent to itself does not go through LIBFABRIC");
  {
    const auto guard = engine_->lock();
    NIXL_TRY(link->notify_locked(message));
    (void)engine_->progress_locked();
  }
  wake();
  return {};
}

void FabricBackend::drain(std::vector<Notification>& out) {
  (void)progress();
  if (!any_arrived_.load(std::memory_order_acquire)) return;
  const auto guard = engine_->lock();
  any_arrived_.store(false, std::memory_order_relaxed);
  out.insert(out.end(), std::make_move_iterator(arrived_.begin()), std::make_move_iterator(arrived_.end()));
  arrived_.clear();
}

bool FabricBackend::progress() noexcept {
  return thread_.joinable() ? false : engine_->progress();
}

}  // namespace nixl::core::libfabric
