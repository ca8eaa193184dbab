#include "backends/ucx/backend.h"

#include <algorithm>
#include <thread>

#include "base/env.h"
#include "base/log.h"

namespace nixl::core::ucx {
namespace {

constexpr Nanoseconds kMillisecond = 1'000'000;
constexpr Nanoseconds kLinger = 300 * kMillisecond;            // for queued messages when a connection is closed
constexpr Nanoseconds kReadersPatience = 1000 * kMillisecond;  // for reads being served when memory is deregistered
constexpr Nanoseconds kPatienceWithoutThread = 5 * kMillisecond;
constexpr std::uint32_t kMaxWorkers = 256;
constexpr std::size_t kMaxMessageBytes = std::size_t{1} << 30;

}  // namespace

Result<std::unique_ptr<Backend>> UcxBackend::open(BackendConfig config, KindSet kinds, int engines) {
  std::unique_ptr<UcxBackend> backend(new UcxBackend());
  backend->config_ = std::move(config);
  backend->engines_ = engines;
  NIXL_ASSIGN(backend->options_, parse_options(backend->config_.params));
  NIXL_ASSIGN(const auto reconnect_ms, env_int("NIXL_RECONNECT_MS"));
  if (reconnect_ms) backend->caller_.reconnect_ns = std::max<std::int64_t>(*reconnect_ms, 0) * kMillisecond;
  backend->caller_.name = backend->config_.self.name;
  backend->caller_.incarnation = backend->config_.self.incarnation;
  backend->abilities_ = {.local_kinds = kinds, .remote_kinds = kinds, .remote = true, .local = true};
  NIXL_ASSIGN(backend->context_, Context::open(backend->options_));
  NIXL_TRY(backend->start(engines > 0 ? engines : backend->options_.num_workers + backend->options_.num_threads));
  return std::unique_ptr<Backend>(std::move(backend));
}

Result<void> UcxBackend::start(int num_workers) {
  desks_ = std::vector<Desk>(static_cast<std::size_t>(num_workers));
  for (std::size_t i = 0; i < desks_.size(); ++i) {
    NIXL_ASSIGN(desks_[i].worker, Worker::open(*context_, *this, static_cast<unsigned>(i)));
  }
  NIXL_TRY(start_drivers());
  return open_sleeper();
}

// The workers of num_threads. Where progress happens only inside calls, they are driven like the others.
Result<void> UcxBackend::start_drivers() {
  if (engines_ > 0 || !config_.progress_thread) return {};
  for (auto i = static_cast<std::size_t>(options_.num_workers); i < desks_.size(); ++i) {
    desks_[i].driven = true;
    NIXL_ASSIGN(desks_[i].driver, Driver::start(*desks_[i].worker));
  }
  return {};
}

Result<void> UcxBackend::open_sleeper() {
  std::vector<int> watched;
  for (const Desk& desk : desks_)
    if (!desk.driven) watched.push_back(desk.worker->event_fd());
  return sleeper_.open("UCX", std::move(watched));
}

UcxBackend::~UcxBackend() {
  for (Desk& desk : desks_) desk.driver.reset();
  for (Desk& desk : desks_) {
    if (!desk.worker) continue;
    const auto guard = desk.worker->lock();
    (void)desk.worker->progress_locked();  // who called just now is answered, and told
    for (auto& [key, link] : desk.answering)
      if (link->state() == Link::State::kReady)
        (void)desk.worker->send_locked(link->endpoint(), kBye, encode(Bye{config_.self.incarnation}));
    for (auto& [key, link] : desk.answering) link->lose_locked(Error{Code::kPeerLost, "this agent is closing"});
    const Deadline deadline = Deadline::after(kReadersPatience);
    while (!desk.services.empty() && !deadline.passed()) (void)desk.worker->progress_locked();
    for (auto& [key, link] : desk.answering) link->close_locked(0);
    for (auto& link : desk.ended_links) link->close_locked(0);
    (void)desk.worker->progress_locked();
    for (auto& service : desk.services)
      if (!service->ended()) (void)service.release();  // UCX may still complete its operations
    desk.services.clear();
    desk.answering.clear();
    desk.ended_links.clear();
  }
}

// ---- regions ----

Result<void> UcxBackend::check_device(const Region& region) const {
  if (engines_ > 0 && region.device >= static_cast<std::uint64_t>(engines_))
    return fail(Code::kInvalidArgument, "UCX_MO: device %llu of a descriptor is not below the number of engines, %d",
                static_cast<unsigned long long>(region.device), engines_);
  return {};
}

Result<std::unique_ptr<LocalRegion>> UcxBackend::add_region(const Region& region) {
  if (!abilities_.local_kinds.has(region.kind))
    return fail(Code::kInvalidArgument, "UCX does not serve %s on this machine", name(region.kind));
  NIXL_TRY(check_device(region));
  NIXL_ASSIGN(auto memory, Memory::open(*context_, region));
  return std::make_unique<Registered>(
      exposed_.add(region, std::move(memory)), [this](Exposed& exposed) { release_region(exposed); }, region.device);
}

// From here on no peer may reach the memory: reads being served end, and peers are told not to write.
void UcxBackend::release_region(Exposed& region) {
  region.revoked.store(true, std::memory_order_release);
  exposed_.remove(region.id);
  // Reads under way are let to end. One that an asker has stopped taking goes on to hold the registration, and will
  // report that the memory went away.
  const Deadline deadline = Deadline::after(kReadersPatience);
  while (region.readers.load(std::memory_order_acquire) > 0 && !deadline.passed())
    for (Desk& desk : desks_) {
      const auto guard = desk.worker->lock();
      (void)desk.worker->progress_locked();
    }
  if (!region.exported) return;
  const std::string message = encode(Revoke{config_.self.incarnation, region.id});
  for (Desk& desk : desks_) {
    const auto guard = desk.worker->lock();
    for (auto& [key, link] : desk.answering)
      if (link->state() == Link::State::kReady) (void)desk.worker->send_locked(link->endpoint(), kRevoke, message);
  }
}

Result<std::string> UcxBackend::export_region(const LocalRegion& region) {
  Exposed& exposed = static_cast<const Registered&>(region).exposed();
  exposed.exported = true;
  return export_key(exposed);
}

Result<std::unique_ptr<RemoteRegion>> UcxBackend::import_region(Connection& peer, const Region& region,
                                                                std::string_view key) {
  if (!abilities_.remote_kinds.has(region.kind))
    return fail(Code::kUnsupported, "UCX does not reach %s from this machine", name(region.kind));
  NIXL_TRY(check_device(region));
  auto& connection = static_cast<UcxConnection&>(peer);
  NIXL_ASSIGN(auto imported, Imported::open(key, imported_, connection.peer().incarnation));
  return imported;
}

// ---- connections ----

Result<std::string> UcxBackend::export_connection() {
  ByteWriter out;
  out.put_all(kMessageVersion, static_cast<std::uint32_t>(desks_.size()));
  for (const Desk& desk : desks_) out.put_text(desk.worker->address());
  return sealed(out.take());
}

Result<std::unique_ptr<Connection>> UcxBackend::connect(const PeerId& peer, std::string_view bytes) {
  NIXL_ASSIGN(const std::string_view content, unsealed(bytes, "UCX"));  // UCX itself does not check what it unpacks
  ByteReader in(content);
  NIXL_ASSIGN(const auto version, in.get<std::uint32_t>());
  if (version != kMessageVersion)
    return fail(Code::kMismatch, "agent '%s': UCX connection bytes of version 0x%x, this side speaks 0x%x",
                peer.name.c_str(), version, kMessageVersion);
  NIXL_ASSIGN(const auto num_addresses, in.get<std::uint32_t>());
  if (num_addresses == 0 || num_addresses > kMaxWorkers)
    return fail(Code::kMismatch, "agent '%s': %u UCX addresses, 1 to %u are possible", peer.name.c_str(), num_addresses,
                kMaxWorkers);
  std::vector<std::string> addresses;
  for (std::uint32_t i = 0; i < num_addresses; ++i) {
    NIXL_ASSIGN(const auto address, in.get_text(kMaxAddressBytes));
    addresses.emplace_back(address);
  }

  auto connection = std::make_unique<UcxConnection>(*this, peer);
  for (std::size_t i = 0; i < desks_.size(); ++i) {
    Desk& desk = desks_[i];
    Link::Target target{.name = peer.name, .address = addresses[i % addresses.size()], .incarnation = peer.incarnation};
    target.is_self = peer.incarnation == config_.self.incarnation && peer.name == config_.self.name;
    target.peer_errors = options_.peer_errors;
    target.force_close = options_.force_close;
    const auto guard = desk.worker->lock();
    NIXL_ASSIGN(auto link, Link::open_locked(*desk.worker, std::move(target), caller_));
    desk.calling.emplace(link->id(), link.get());
    const std::lock_guard owners_guard(connections_mutex_);
    owners_.emplace(link.get(), connection.get());
    connection->links_.push_back(std::move(link));
  }
  const Link& first = connection->link(0);
  NIXL_INFO("agent '%s' is reached through UCX over %s", peer.name.c_str(), first.path().c_str());
  if (first.only_tcp() && have_rdma_device())
    NIXL_WARN("agent '%s' is reached over %s only although this host has an RDMA device: transfers will be slow. %s",
              peer.name.c_str(), first.path().c_str(), context_->api().remark.c_str());
  sleeper_.wake();
  for (const Desk& desk : desks_)
    if (desk.driver) desk.driver->wake();
  return connection;
}

void UcxBackend::close_connection(UcxConnection& connection) {
  for (const auto& link : connection.links_) {
    Desk& desk = desks_[link->worker().index()];
    const auto guard = desk.worker->lock();
    desk.calling.erase(link->id());
    {
      const std::lock_guard owners_guard(connections_mutex_);
      owners_.erase(link.get());
    }
    link->close_locked(options_.force_close ? 0 : kLinger);
  }
}

UcxConnection::~UcxConnection() {
  backend_->close_connection(*this);
}

Result<void> UcxConnection::wait_ready(Deadline deadline) {
  // Without progress threads the peer may be this very thread's other agent, which answers when it is polled: not
  // waited for.
  const Deadline patience =
      backend_->config_.progress_thread ? deadline : Deadline::after(kPatienceWithoutThread).earlier(deadline);
  for (const auto& link : links_) {
    while (true) {
      {
        const auto guard = link->worker().lock();
        (void)link->worker().progress_locked();
        if (link->state() == Link::State::kReady) break;
        if (link->state() == Link::State::kLost) return fail(link->lost_because());
      }
      if (patience.passed()) {
        if (!backend_->config_.progress_thread && !deadline.passed()) return {};
        return fail(Code::kTimeout, "agent '%s' has not answered over %s", peer_.name.c_str(), link->path().c_str());
      }
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
  }
  return {};
}

void UcxBackend::link_lost_locked(Link& link, const Error& why) {
  UcxConnection* connection = nullptr;
  {
    const std::lock_guard guard(connections_mutex_);
    const auto found = owners_.find(&link);
    if (found != owners_.end()) connection = found->second;
  }
  if (!connection || connection->reported_.exchange(true)) return;
  if (!config_.events) return;
  if (link.missed_by_none())
    config_.events->peer_left(connection->peer(), why);
  else
    config_.events->peer_lost(connection->peer(), why);
}

bool UcxBackend::surely_gone(const Link& link) const {
  return config_.events && config_.events->surely_gone({link.target().name, link.target().incarnation});
}

// ---- messages ----

void UcxBackend::received_locked(Worker& worker, MessageId id, std::string_view bytes) {
  Desk& desk = desks_[worker.index()];
  if (auto handled = handle_locked(desk, id, bytes); !handled)
    NIXL_WARN("UCX: a message of kind %u from another process is dropped: %s", id, handled.error().reason.c_str());
}

Result<void> UcxBackend::handle_locked(Desk& desk, MessageId id, std::string_view bytes) {
  switch (id) {
    case kHello: {
      Hello hello;
      NIXL_TRY(decode(bytes, hello));
      return answer_hello_locked(desk, hello);
    }
    case kHelloAck: {
      HelloAck ack;
      NIXL_TRY(decode(bytes, ack));
      const auto found = desk.calling.find(ack.link);
      if (found != desk.calling.end()) found->second->acknowledged_locked(ack);
      return {};
    }
    case kNotify: {
      Notify notify;
      NIXL_TRY(decode(bytes, notify));
      inbox_.add(notify.incarnation, notify.stream, notify.sequence,
                 {std::string(notify.name), std::string(notify.text)});
      if (desk.driven) sleeper_.note_news();
      return {};
    }
    case kReadRequest:
      return serve_read_locked(desk, bytes);
    case kReadDone: {
      ReadDone done;
      NIXL_TRY(decode(bytes, done));
      if (Lane* const lane = desk.requests.close(done.request)) lane->answered_locked(done);
      return {};
    }
    case kRevoke: {
      Revoke revoke;
      NIXL_TRY(decode(bytes, revoke));
      imported_.revoke(revoke.incarnation, revoke.region);
      return {};
    }
    case kBye: {
      Bye bye;
      NIXL_TRY(decode(bytes, bye));
      dismiss_locked(desk, bye);
      return {};
    }
    default:
      return fail(Code::kMismatch, "unknown kind");
  }
}

Result<void> UcxBackend::answer_hello_locked(Desk& desk, const Hello& hello) {
  auto& slot = desk.answering[{hello.incarnation, hello.link}];
  if (slot) {  // the caller's end broke and it calls again
    slot->lose_locked(Error{Code::kPeerLost, "agent '" + hello.name + "' opened a new link"});
    desk.ended_links.push_back(std::move(slot));
  }
  Link::Target target{
      .name = hello.name, .address = hello.address, .incarnation = hello.incarnation, .answer_only = true};
  target.peer_errors = options_.peer_errors;
  auto link = Link::open_locked(*desk.worker, std::move(target), caller_);
  if (!link) {
    desk.answering.erase({hello.incarnation, hello.link});
    return fail(std::move(link.error()));
  }
  slot = std::move(*link);
  // Whoever was expected here and is not: the answer carries our own incarnation, and the caller draws the conclusion.
  return desk.worker->send_locked(
      slot->endpoint(), kHelloAck,
      encode(HelloAck{hello.link, config_.self.incarnation, inbox_.next_sequence(hello.incarnation, hello.link)}));
}

void UcxBackend::dismiss_locked(Desk& desk, const Bye& bye) {
  std::vector<Link*> gone;
  for (const auto& [id, link] : desk.calling)
    if (link->target().incarnation == bye.incarnation) gone.push_back(link);
  for (Link* const link : gone) link->dismissed_locked();
}

Result<void> UcxBackend::serve_read_locked(Desk& desk, std::string_view bytes) {
  ReadRequest request;
  NIXL_TRY(decode(bytes, request));
  const auto found = desk.answering.find({request.incarnation, request.link});
  if (found == desk.answering.end() || found->second->state() != Link::State::kReady)
    return {};  // it broke; the asker knows
  desk.services.push_back(std::make_unique<ReadService>(std::string(bytes), *found->second, exposed_));
  desk.services.back()->start_locked();
  return {};
}

void UcxBackend::settled_locked(Worker& worker) {
  Desk& desk = desks_[worker.index()];
  if (!desk.services.empty())
    std::erase_if(desk.services, [&](const auto& service) {
      if (service->ended()) worker.forget_locked(*service);
      return service->ended();
    });
  for (auto it = desk.answering.begin(); it != desk.answering.end();) {
    if (it->second->state() == Link::State::kLost) {
      desk.ended_links.push_back(std::move(it->second));
      it = desk.answering.erase(it);
    } else {
      ++it;
    }
  }
  std::erase_if(desk.ended_links, [&](const auto& link) {
    return std::none_of(desk.services.begin(), desk.services.end(),
                        [&](const auto& s) { return &s->link() == link.get(); });
  });
}

// ---- notifier ----

Result<void> UcxBackend::send(Connection& peer, std::string_view message) {
  if (message.size() > kMaxMessageBytes)
    return fail(Code::kInvalidArgument, "notification of %zu bytes, at most %zu are possible", message.size(),
                kMaxMessageBytes);
  Link& link = static_cast<UcxConnection&>(peer).link(0);
  {
    const auto guard = link.worker().lock();
    NIXL_TRY(link.notify_locked(message));
    (void)link.worker().progress_locked();
  }
  sleeper_.wake();
  return {};
}

void UcxBackend::drain(std::vector<Notification>& out) {
  (void)progress();
  inbox_.drain(out);
}

// ---- progress ----

bool UcxBackend::progress() noexcept {
  bool any = false;
  for (Desk& desk : desks_)
    if (!desk.driven) any |= desk.worker->progress();
  return any;
}

bool UcxBackend::arm() noexcept {
  return sleeper_.arm([this](Deadline& next) {
    return std::all_of(desks_.begin(), desks_.end(),
                       [&](const Desk& desk) { return desk.driven || desk.worker->arm(next); });
  });
}

void UcxBackend::wake(const Worker& worker) noexcept {
  Driver* const driver = desks_[worker.index()].driver.get();
  if (driver)
    driver->wake();
  else
    sleeper_.wake();
}

void UcxBackend::job_ended_locked(Worker& worker) {
  // The agent's thread looks for ended transfers when it arms.
  if (desks_[worker.index()].driven) sleeper_.note_news();
}

}  // namespace nixl::core::ucx
