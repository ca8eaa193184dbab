// The part of Agent that deals with other agents: metadata out and in, connections, loss.
#include <algorithm>
#include <set>

#include "agent/agent.h"
#include "agent/exchange.h"
#include "agent/telemetry.h"
#include "agent/trace.h"
#include "base/log.h"

namespace nixl::core {
namespace {

struct Census {
  std::mutex mutex;
  std::set<std::uint64_t> alive;
};
Census& census() {
  static Census* const all = new Census;  // agents may be destroyed at exit
  return *all;
}

bool gone(const Peer& peer) {
  if (surely_dead(peer.home)) return true;
  const Home here = home_of_this_process();
  if (peer.home.host != here.host || peer.home.process != here.process) return false;
  Census& all = census();
  const std::lock_guard lock(all.mutex);
  return !all.alive.count(peer.incarnation);
}

}  // namespace

void enter_census(std::uint64_t incarnation) {
  Census& all = census();
  const std::lock_guard lock(all.mutex);
  all.alive.insert(incarnation);
}
void leave_census(std::uint64_t incarnation) {
  Census& all = census();
  const std::lock_guard lock(all.mutex);
  all.alive.erase(incarnation);
}

// ---- out

Metadata Agent::envelope() const {
  Metadata data;
  data.agent = name();
  data.incarnation = incarnation_;
  data.revision = revision_;
  data.home = home_;
  return data;
}

BackendInfo Agent::info_of(Slot& slot, bool connection) const {
  BackendInfo info;
  info.name = slot.name();
  info.has_connection = connection;
  if (connection) info.connection = slot.connection;
  return info;
}

Result<Metadata> Agent::full_metadata() const {
  NIXL_TRY(usable());
  const std::lock_guard unchanged(changes_mutex_);
  Metadata data = envelope();
  data.complete = true;
  for (Slot* slot : slots()) {
    if (!slot->abilities().remote) continue;
    BackendInfo info = info_of(*slot, true);
    for (const auto& entry : slot->regions.all())
      if (slot->abilities().remote_kinds.has(entry->region.kind)) info.regions.push_back({entry->region, entry->key});
    data.backends.push_back(std::move(info));
  }
  return data;
}

Result<Metadata> Agent::some_metadata(const Descs& descs, bool connections, BackendIds backends) const {
  NIXL_ASSIGN(const std::vector<Slot*> allowed, chosen(backends, true));
  const std::lock_guard unchanged(changes_mutex_);
  Metadata data = envelope();
  const bool with_connection = connections || descs.rows() == 0;
  bool any_usable = false, any_holds = false;
  std::size_t missing = 0;  // the furthest row that a backend does not hold
  for (Slot* slot : allowed) {
    if (!slot->abilities().remote) continue;
    if (descs.rows() && !slot->abilities().remote_kinds.has(kind_of(descs))) continue;
    any_usable |= !slot->is_companion;
    BackendInfo info = info_of(*slot, with_connection);
    std::size_t row = 0;
    for (; row < descs.rows(); ++row) {
      const auto entry = slot->regions.exact({kind_of(descs), descs.addr[row], descs.len[row], descs.dev[row], {}});
      if (!entry) break;
      info.regions.push_back({entry->region, entry->key});
    }
    if (row < descs.rows()) {
      missing = std::max(missing, row);
      continue;
    }
    any_holds = true;
    data.backends.push_back(std::move(info));
  }
  if (!any_usable)
    return fail(Code::kIo, "no backend of agent '%s' reaches other agents with these descriptors", name().c_str());
  if (!any_holds)
    return fail(Code::kNotFound, "%s is not registered exactly as given", describe(descs, missing).c_str());
  return data;
}

Result<std::string> Agent::metadata() const {
  NIXL_ASSIGN(const Metadata data, full_metadata());
  return encode(data);
}

Result<std::string> Agent::partial_metadata(const Descs& descs, bool connections, BackendIds backends) const {
  NIXL_ASSIGN(const Metadata data, some_metadata(descs, connections, backends));
  return encode(data);
}

// ---- in

std::shared_ptr<Peer> Agent::listed_peer(const std::string& agent) const {
  const std::shared_lock lock(mutex_);
  const auto found = peers_.find(agent);
  return found == peers_.end() ? nullptr : found->second;
}

std::shared_ptr<Peer> Agent::known_peer(const std::string& agent) const {
  auto found = listed_peer(agent);
  return found && found->state.load(std::memory_order_acquire) == Peer::State::kAlive ? found : nullptr;
}

Result<std::shared_ptr<Peer>> Agent::peer(const std::string& agent) {
  NIXL_TRY(usable());
  runtime_->handle_lost();
  if (agent == name()) return self_;
  auto found = known_peer(agent);
  if (!found && exchange_->discovers()) {
    NIXL_TRY(exchange_->fetch_now(agent));
    found = known_peer(agent);
  }
  if (!found)
    return fail(Code::kNotFound, "agent '%s' is unknown to agent '%s': load its metadata first", agent.c_str(),
                name().c_str());
  return found;
}

namespace {

struct Staged {
  Slot* slot = nullptr;
  PeerLink* link = nullptr;  // existing, or fresh.get()
  std::unique_ptr<PeerLink> fresh;
  std::vector<std::shared_ptr<RemoteEntry>> entries;
};

Result<void> stage_connection(Staged& staged, const BackendInfo& info, const Metadata& data, bool optional) {
  if (!info.has_connection || staged.link) {
    if (info.has_connection && staged.link->bytes != info.connection)
      return fail(Code::kNotAllowed, "agent '%s' is known with another %s connection; remove it first",
                  data.agent.c_str(), info.name.c_str());
    return {};
  }
  staged.fresh = std::make_unique<PeerLink>();
  staged.link = staged.fresh.get();
  staged.link->slot = staged.slot;
  staged.link->bytes = info.connection;
  const auto lock = staged.slot->setup();
  auto connection = staged.slot->backend->connect({data.agent, data.incarnation}, info.connection);
  if (connection) {
    staged.link->connection = std::move(*connection);
  } else if (optional || connection.error().code == Code::kUnsupported) {
    staged.link->unreachable = connection.error().reason;
  } else {
    return fail(Code::kIo, "agent '%s' by %s: %s", data.agent.c_str(), info.name.c_str(),
                connection.error().reason.c_str());
  }
  return {};
}

// Leaves in `info` the regions that the link does not have and of which it knows nothing newer.
void keep_news(const PeerLink& link, BackendInfo& info, const Metadata& data) {
  if (data.revision < link.complete_revision) {  // what it holds is known, or gone since
    NIXL_DEBUG("agent '%s' by %s: metadata of revision %llu came after that of revision %llu; nothing is taken from it",
               data.agent.c_str(), info.name.c_str(), static_cast<unsigned long long>(data.revision),
               static_cast<unsigned long long>(link.complete_revision));
    info.regions.clear();
    return;
  }
  std::erase_if(info.regions, [&](const RegionInfo& item) {
    const auto held = link.regions.exact(item.region);
    if (!held) return false;
    if (held->key != item.key) return held->revision > data.revision;
    held->revision = std::max(held->revision, data.revision);  // true, whatever becomes of the rest
    return true;
  });
}

// Takes the regions out of `info`.
Result<void> stage_regions(Staged& staged, BackendInfo& info, const Metadata& data, bool optional) {
  if (info.regions.empty()) return {};
  if (!staged.link) {
    if (optional) return {};
    return fail(Code::kNotFound, "regions of agent '%s' for %s came before its connection: load that first",
                data.agent.c_str(), info.name.c_str());
  }
  if (!staged.link->connection) return {};
  if (!staged.fresh) keep_news(*staged.link, info, data);
  const auto lock = staged.slot->setup();
  const std::shared_ptr<RemoteEntry[]> block(new RemoteEntry[info.regions.size()]);  // one allocation for all of them
  staged.entries.reserve(info.regions.size());
  for (RegionInfo& item : info.regions) {
    auto object = staged.slot->backend->import_region(*staged.link->connection, item.region, item.key);
    if (!object && optional) continue;
    if (!object)
      return fail(Code::kIo, "region 0x%llx of agent '%s' by %s: %s",
                  static_cast<unsigned long long>(item.region.address), data.agent.c_str(), info.name.c_str(),
                  object.error().reason.c_str());
    RemoteEntry& entry = block[staged.entries.size()];
    entry.region = std::move(item.region);
    entry.key = std::move(item.key);
    entry.object = std::move(*object);
    entry.revision = data.revision;
    staged.entries.emplace_back(block, &entry);
  }
  return {};
}

// Cannot fail. Of what two revisions say about a region, the newer counts.
void settle(Staged& staged, Peer& peer, const Metadata& data) {
  PeerLink* const link = staged.link;
  if (!link) return;
  const auto retire = [&](const auto& entries) {
    for (const auto& old : entries) staged.slot->retire(*old);
  };
  retire(link->regions.put(staged.entries));
  if (data.complete && data.revision >= link->complete_revision) {
    link->complete_revision = data.revision;
    if (!staged.fresh)
      retire(link->regions.remove_if([&](const RemoteEntry& entry) { return entry.revision < data.revision; }));
  }
  if (staged.fresh) peer.adopt(std::move(staged.fresh));
}

}  // namespace

Result<std::shared_ptr<Peer>> Agent::admit(Metadata data) {
  if (data.agent == name())
    return fail(Code::kInvalidArgument, "this is the metadata of agent '%s' itself", name().c_str());
  runtime_->handle_lost();
  auto known = listed_peer(data.agent);
  if (known && known->state != Peer::State::kAlive) {
    forget(known, Peer::State::kLost, "");
    known.reset();
  }
  if (known && known->incarnation != data.incarnation && gone(*known)) {
    forget(known, Peer::State::kLost, "its process is gone");
    known.reset();
  }
  if (known && known->incarnation != data.incarnation)
    return fail(Code::kNotAllowed, "agent '%s' is known as another incarnation that may still live; remove it first",
                data.agent.c_str());
  std::shared_ptr<Peer> peer = known;
  if (!peer) {
    peer = std::make_shared<Peer>();
    peer->name = data.agent;
    peer->incarnation = data.incarnation;
    peer->home = data.home;
  }
  std::vector<Staged> staged;
  const auto unstage = [&] {
    for (Staged& one : staged) {
      for (const auto& entry : one.entries) one.slot->retire(*entry);
      if (one.fresh) one.fresh->retire();
    }
  };
  bool common = false;
  std::string why;
  for (BackendInfo& info : data.backends) {
    Slot* const slot = this->slot(info.name);
    if (!slot || !slot->abilities().remote) continue;
    Staged& one = staged.emplace_back();
    one.slot = slot;
    one.link = peer->link(*slot);
    const bool optional = slot->is_companion;
    auto done = stage_connection(one, info, data, optional);
    if (done) done = stage_regions(one, info, data, optional);
    if (!done) {
      unstage();
      return fail(done.error());
    }
    if (one.link && one.link->connection) common |= !optional;
    if (one.link && !one.link->unreachable.empty()) why += "; " + slot->name() + ": " + one.link->unreachable;
  }
  if (!common) {
    unstage();
    return fail(Code::kIo, "agent '%s' shares no backend with agent '%s'%s", data.agent.c_str(), name().c_str(),
                why.c_str());
  }
  for (Staged& one : staged) settle(one, *peer, data);
  if (!known) {
    const std::unique_lock lock(mutex_);
    peers_[peer->name] = peer;
  }
  return peer;
}

Result<std::string> Agent::load(std::string_view bytes) {
  const TracedCall traced(tracer_, "load_metadata");
  NIXL_TRY(usable());
  NIXL_ASSIGN(Metadata data, decode(bytes));
  const std::lock_guard lock(load_mutex_);
  NIXL_ASSIGN(const auto peer, admit(std::move(data)));
  return peer->name;
}

void Agent::forget(const std::shared_ptr<Peer>& peer, Peer::State state, const std::string& reason) {
  peer->end(state, reason);
  if (peer->forgotten.exchange(true)) return;
  {
    const std::unique_lock lock(mutex_);
    const auto found = peers_.find(peer->name);
    if (found != peers_.end() && found->second == peer) peers_.erase(found);
  }
  const Error error = state == Peer::State::kLost
                          ? Error{Code::kPeerLost, "agent '" + peer->name + "' is lost: " + peer->why}
                          : Error{Code::kNotFound, "agent '" + peer->name + "' was removed"};
  for (const auto& request : runtime_->under_way())
    if (request->peer() == peer.get()) request->stop(error);
  peer->retire();
}

Result<void> Agent::remove(const std::string& agent) {
  NIXL_TRY(usable());
  if (const auto peer = known_peer(agent)) forget(peer, Peer::State::kRemoved, "");
  return {};
}

void Agent::on_lost(const Runtime::Options::Loss& loss) {
  const auto peer = listed_peer(loss.peer.name);
  if (!peer || peer->incarnation != loss.peer.incarnation) return;
  if (loss.expected)
    NIXL_INFO("agent %s: %s", name().c_str(), loss.why.reason.c_str());
  else
    NIXL_WARN("agent %s: %s", name().c_str(), loss.why.reason.c_str());
  forget(peer, Peer::State::kLost, loss.why.reason);
}

bool Agent::process_gone(const PeerId& id) const {
  const auto peer = listed_peer(id.name);
  return peer && peer->incarnation == id.incarnation && gone(*peer);
}

Result<void> Agent::check_peer(const std::string& agent, const Descs* descs) {
  NIXL_TRY(usable());
  runtime_->help();
  runtime_->handle_lost();
  const auto found = agent == name() ? self_ : known_peer(agent);
  if (!found) {
    if (exchange_->discovers()) exchange_->fetch_stored(agent, "");
    return fail(Code::kNotFound, "agent '%s' is unknown", agent.c_str());
  }
  if (!descs || descs->rows() == 0) return {};
  const auto list = prepare_remote(*descs, found, slots());
  return list ? Result<void>() : Result<void>(fail(list.error()));
}

Result<void> Agent::connect(const std::string& agent, BackendIds backends, Nanoseconds timeout_ns) {
  NIXL_ASSIGN(const std::vector<Slot*> allowed, chosen(backends, true));
  NIXL_ASSIGN(const auto to, peer(agent));
  const Deadline deadline = Deadline::after(timeout_ns);
  bool any = false;
  std::string why;
  for (Slot* slot : allowed) {
    PeerLink* link = to->link(*slot);
    if (!link) continue;
    if (!link->connection) {
      why += "; " + slot->name() + ": " + link->unreachable;
      continue;
    }
    if (!link->usage.acquire()) return fail(Code::kNotFound, "agent '%s' was removed meanwhile", agent.c_str());
    auto ready = link->connection->wait_ready(deadline);
    link->release();
    if (!ready && ready.error().code == Code::kPeerLost)
      runtime_->peer_lost({to->name, to->incarnation}, ready.error());
    if (!ready && !slot->is_companion)
      return fail(Code::kIo, "%s: %s", slot->name().c_str(), ready.error().reason.c_str());
    any = true;
  }
  if (!any)
    return fail(Code::kIo, "agent '%s' shares no backend with agent '%s'%s", agent.c_str(), name().c_str(),
                why.c_str());
  return {};
}

// ---- exchange

void Agent::memory_changed() {
  if (!exchange_ || !exchange_->discovers()) return;
  if (const auto data = full_metadata()) exchange_->publish("metadata", data->revision, encode(*data));
}

namespace {
Result<void> need_store(const Exchange& exchange) {
  if (exchange.has_store()) return {};
  return fail(Code::kInvalidArgument,
              "no ip address was given and no store is configured: set NIXL_ETCD_ENDPOINTS or "
              "NIXL_TCPSTORE_ENDPOINT, or pass an address");
}
}  // namespace

Result<void> Agent::send_metadata(const std::string& ip, std::uint16_t port) {
  NIXL_ASSIGN(const Metadata data, full_metadata());
  if (!ip.empty()) {
    exchange_->send(ip, port, encode(data));
    return {};
  }
  NIXL_TRY(need_store(*exchange_));
  exchange_->publish("metadata", data.revision, encode(data));
  return {};
}

Result<void> Agent::send_partial(const Descs& descs, bool connections, BackendIds backends, const std::string& ip,
                                 std::uint16_t port, const std::string& label) {
  NIXL_ASSIGN(const Metadata data, some_metadata(descs, connections, backends));
  if (!ip.empty()) {
    exchange_->send(ip, port, encode(data));
    return {};
  }
  NIXL_TRY(need_store(*exchange_));
  if (label.empty()) return fail(Code::kInvalidArgument, "partial metadata in a store needs a label");
  exchange_->publish(label, data.revision, encode(data));
  return {};
}

Result<void> Agent::fetch(const std::string& agent, const std::string& ip, std::uint16_t port,
                          const std::string& label) {
  NIXL_TRY(usable());
  if (!ip.empty()) {
    exchange_->fetch(ip, port, agent);
    return {};
  }
  NIXL_TRY(need_store(*exchange_));
  exchange_->fetch_stored(agent, label);
  return {};
}

Result<void> Agent::invalidate(const std::string& ip, std::uint16_t port) {
  NIXL_TRY(usable());
  if (!ip.empty()) {
    exchange_->invalidate(ip, port);
    return {};
  }
  NIXL_TRY(need_store(*exchange_));
  exchange_->withdraw();
  return {};
}

std::uint16_t Agent::listen_port() const noexcept {
  return exchange_ ? exchange_->port() : 0;
}

}  // namespace nixl::core
