#include "agent/agent.h"

#include <algorithm>
#include <random>

#include "agent/exchange.h"
#include "agent/settings.h"
#include "agent/telemetry.h"
#include "agent/trace.h"
#include "base/env.h"
#include "base/log.h"

namespace nixl::core {
namespace {

std::uint64_t new_incarnation() {
  std::random_device random;
  return static_cast<std::uint64_t>(random()) << 32 | random() | 1;
}

// Whether a variable or the owner's parameters say no to a stand-in.
Result<bool> is_off(const BackendEntry& stand_in, const Params& params) {
  NIXL_ASSIGN(const auto by_variable, env_bool(stand_in.off_env.c_str()));
  const bool off = !by_variable.value_or(true);
  const auto given = params.find(stand_in.off_param);
  if (given == params.end() || given->second.empty()) return off;
  const auto wanted = parse_bool(given->second);
  if (!wanted)
    return fail(Code::kInvalidArgument,
                "parameter %s is '%s'; allowed: y yes on 1 true enable, n no off 0 false disable",
                stand_in.off_param.c_str(), given->second.c_str());
  return off || !*wanted;
}

}  // namespace

Agent::Agent(AgentOptions options, Catalog& catalog)
    : options_(std::move(options)), catalog_(catalog), incarnation_(new_incarnation()) {
  enter_census(incarnation_);
}

Result<std::unique_ptr<Agent>> Agent::open(AgentOptions options, Catalog& catalog) {
  if (options.name.empty()) return fail(Code::kInvalidArgument, "the agent's name is empty");
  if (options.name.size() > kMaxName)
    return fail(Code::kInvalidArgument, "the agent's name has %zu bytes; at most %zu are allowed", options.name.size(),
                kMaxName);
  catalog.refresh();
  std::unique_ptr<Agent> agent(new Agent(std::move(options), catalog));
  NIXL_TRY(agent->start());
  return agent;
}

Result<void> Agent::start() {
  NIXL_ASSIGN(const Settings settings, Settings::read());
  tracer_ = open_tracer(settings, options_.name);
  NIXL_ASSIGN(telemetry_, Telemetry::open(settings, options_.name, options_.capture_telemetry));
  self_ = std::make_shared<Peer>();
  self_->name = options_.name;
  self_->incarnation = incarnation_;
  self_->is_self = true;
  Runtime::Options runtime;
  runtime.agent = options_.name;
  runtime.progress_thread = options_.progress_thread;
  runtime.on_lost = [this](const Runtime::Options::Loss& loss) { on_lost(loss); };
  runtime.gone = [this](const PeerId& peer) { return process_gone(peer); };
  runtime.telemetry = telemetry_.get();
  runtime.tracer = tracer_;
  NIXL_ASSIGN(runtime_, Runtime::open(std::move(runtime)));

  Exchange::Hooks hooks;
  hooks.agent = options_.name;
  hooks.metadata = [this] { return metadata(); };
  hooks.load = [this](std::string_view bytes) { return load(bytes); };
  hooks.name_in = [](std::string_view bytes) -> Result<std::string> {
    NIXL_ASSIGN(const Metadata data, decode(bytes));
    return data.agent;
  };
  hooks.remove = [this](const std::string& agent) { (void)remove(agent); };
  hooks.knows = [this](const std::string& agent) { return known_peer(agent) != nullptr; };
  const Exchange::Options exchange{options_.listen, options_.listen_port, options_.use_etcd, options_.watch_timeout_ns};
  NIXL_ASSIGN(exchange_, Exchange::open(std::move(hooks), exchange, settings, catalog_));
  NIXL_INFO("Initialized NIXL agent: %s", options_.name.c_str());
  return {};
}

Agent::~Agent() {
  leave_census(incarnation_);
  if (exchange_) exchange_->close();
  if (runtime_) runtime_->stop();
  bool all_stopped = true;
  for (const auto& request : requests_.all()) all_stopped &= request->close();
  for (const auto& [name, peer] : peers_) peer->retire();
  if (self_) self_->retire();
  for (auto& slot : slots_) {
    for (const auto& entry : slot->regions.all()) slot->retire(*entry);
    if (all_stopped) {
      slot->backend.reset();
    } else {
      NIXL_ERROR("agent %s: backend %s is left open: I/O in flight did not stop", options_.name.c_str(),
                 slot->name().c_str());
      (void)slot->backend.release();
    }
  }
}

Result<void> Agent::usable() const {
  if (is_elsewhere())
    return fail(Code::kNotAllowed, "agent '%s' belongs to the parent process; a forked child makes its own",
                options_.name.c_str());
  return {};
}

// ---- backends

std::vector<Slot*> Agent::slots() const {
  const std::shared_lock lock(mutex_);
  std::vector<Slot*> list;
  list.reserve(slots_.size());
  for (const auto& slot : slots_) list.push_back(slot.get());
  return list;
}

Slot* Agent::slot(std::uint32_t id) const {
  const std::shared_lock lock(mutex_);
  return id < slots_.size() ? slots_[id].get() : nullptr;
}

Slot* Agent::slot(const std::string& name) const {
  const std::string canonical = catalog_.canonical(name);
  for (Slot* candidate : slots())
    if (candidate->name() == canonical) return candidate;
  return nullptr;
}

Result<std::vector<Slot*>> Agent::chosen(BackendIds backends, bool with_companions) const {
  NIXL_TRY(usable());
  std::vector<Slot*> list;
  for (Slot* candidate : slots()) {
    if (candidate->is_companion) continue;
    if (backends.empty() || std::find(backends.begin(), backends.end(), candidate->id) != backends.end())
      list.push_back(candidate);
  }
  for (const std::uint32_t id : backends)
    if (!slot(id))
      return fail(Code::kInvalidArgument, "backend number %u was not created by agent '%s'", id + 1, name().c_str());
  if (with_companions) {
    const std::size_t count = list.size();
    for (std::size_t i = 0; i < count; ++i)
      if (Slot* companion = list[i]->companion;
          companion && std::find(list.begin(), list.end(), companion) == list.end())
        list.push_back(companion);
  }
  return list;
}

Result<Params> Agent::full_params(const BackendEntry& entry, const Params& given) const {
  Params params = entry.params;
  std::string unknown;
  for (const auto& [key, value] : given) {
    bool known = params.count(key) || (!entry.param_prefix.empty() && key.starts_with(entry.param_prefix));
    for (const BackendEntry* stand_in : catalog_.stand_ins(entry.name))
      known |= stand_in->off_param == key || stand_in->params.count(key);
    if (!known) unknown += (unknown.empty() ? "" : ", ") + key;
    if (!value.empty() || !params.count(key)) params[key] = value;
  }
  if (!unknown.empty()) {
    std::string names;
    for (const auto& [key, value] : entry.params) names += " " + key;
    NIXL_WARN("backend %s: unknown parameter %s; known:%s%s", entry.name.c_str(), unknown.c_str(),
              names.empty() ? " none" : names.c_str(),
              entry.param_prefix.empty() ? "" : (" " + entry.param_prefix + "*").c_str());
  }
  return params;
}

Result<Slot*> Agent::open_slot(const BackendEntry& entry, Params params, bool companion) {
  auto fresh = std::make_unique<Slot>();
  fresh->entry = &entry;
  fresh->params = params;
  fresh->is_companion = companion;
  BackendConfig config;
  config.self = {options_.name, incarnation_};
  config.params = std::move(params);
  config.progress_thread = options_.progress_thread;
  config.events = runtime_.get();
  auto opened = entry.open(std::move(config));
  if (!opened) return fail(Code::kIo, "backend %s: %s", entry.name.c_str(), opened.error().reason.c_str());
  fresh->backend = std::move(*opened);
  fresh->notifier = fresh->backend->notifier();
  const Abilities& can = fresh->abilities();
  if (can.remote && !fresh->notifier && !companion)
    return fail(Code::kIo, "backend %s reaches other agents but has no notifications", entry.name.c_str());
  NIXL_ASSIGN(fresh->connection, fresh->backend->export_connection());
  Slot* raw = fresh.get();
  {
    const std::unique_lock lock(mutex_);
    if (slots_.size() >= kMaxSlots) return fail(Code::kNotAllowed, "an agent holds at most %zu backends", kMaxSlots);
    raw->id = static_cast<std::uint32_t>(slots_.size());
  }
  if (can.local) {
    auto self = raw->backend->connect(PeerId{options_.name, incarnation_}, raw->connection);
    if (!self)
      return fail(Code::kIo, "backend %s: connecting to the own agent: %s", entry.name.c_str(),
                  self.error().reason.c_str());
    auto link = std::make_unique<PeerLink>();
    link->slot = raw;
    link->bytes = raw->connection;
    link->connection = std::move(*self);
    self_->adopt(std::move(link));
  }
  {
    const std::lock_guard change(changes_mutex_);
    const std::unique_lock lock(mutex_);
    slots_.push_back(std::move(fresh));
    ++revision_;
  }
  runtime_->add_slot(*raw);
  return raw;
}

void Agent::add_companion(Slot& owner, const std::vector<const BackendEntry*>& candidates) {
  for (const BackendEntry* entry : candidates) {
    if (Slot* existing = slot(entry->name)) {
      owner.companion = existing;
      return;
    }
    const Probe seen = catalog_.probe(*entry);
    if (!seen.viable) {
      NIXL_INFO("backend %s: %s is not used: %s", owner.name().c_str(), entry->name.c_str(), seen.reason.c_str());
      continue;
    }
    Params params = entry->params;
    for (auto& [key, value] : params)
      if (const auto given = owner.params.find(key); given != owner.params.end()) value = given->second;
    auto opened = open_slot(*entry, std::move(params), true);
    if (!opened) {
      NIXL_WARN("%s; peers of this host are served by %s alone", opened.error().reason.c_str(), owner.name().c_str());
      continue;
    }
    owner.companion = *opened;
    return;
  }
}

Result<std::uint32_t> Agent::create_backend(const std::string& asked, const Params& given) {
  const TracedCall traced(tracer_, "create_backend");
  NIXL_TRY(usable());
  const std::lock_guard lock(registry_mutex_);
  NIXL_ASSIGN(const BackendEntry* entry, catalog_.find(asked));
  if (slot(entry->name))
    return fail(Code::kInvalidArgument, "backend %s exists already in agent '%s'", entry->name.c_str(), name().c_str());
  for (Slot* other : slots()) {
    const auto clash = [](const BackendEntry& a, const BackendEntry& b) {
      return std::find(a.excludes.begin(), a.excludes.end(), b.name) != a.excludes.end();
    };
    if (clash(*entry, *other->entry) || clash(*other->entry, *entry))
      return fail(Code::kNotAllowed, "backends %s and %s cannot be in one agent", entry->name.c_str(),
                  other->name().c_str());
  }
  NIXL_ASSIGN(Params params, full_params(*entry, given));
  std::vector<const BackendEntry*> stand_ins;
  for (const BackendEntry* stand_in : catalog_.stand_ins(entry->name)) {
    NIXL_ASSIGN(const bool off, is_off(*stand_in, params));
    if (!off) stand_ins.push_back(stand_in);
  }
  NIXL_ASSIGN(Slot* const fresh, open_slot(*entry, std::move(params), false));
  add_companion(*fresh, stand_ins);
  NIXL_INFO("Backend %s was instantiated", entry->name.c_str());
  memory_changed();
  return fresh->id;
}

// ---- lists and requests

Result<PreparedList> Agent::remote_list(const std::string& agent, const Descs& descs,
                                        const std::vector<Slot*>& allowed) {
  NIXL_ASSIGN(auto other, peer(agent));
  auto list = prepare_remote(descs, other, allowed);
  if (list || other->is_self || !exchange_->discovers() || descs.rows() == 0) return list;
  NIXL_TRY(exchange_->fetch_now(agent));  // the peer may have registered more since
  NIXL_ASSIGN(other, peer(agent));
  return prepare_remote(descs, other, allowed);
}

Result<std::uint64_t> Agent::prepare_list(const std::string& agent, Descs descs, BackendIds backends) {
  const TracedCall traced(tracer_, "prepare_list");
  NIXL_ASSIGN(const std::vector<Slot*> allowed, chosen(backends, true));
  if (agent.empty()) {
    NIXL_ASSIGN(PreparedList list, prepare_local(std::move(descs), allowed));
    return lists_.add(std::make_shared<PreparedList>(std::move(list)));
  }
  NIXL_ASSIGN(PreparedList list, remote_list(agent, descs, allowed));
  return lists_.add(std::make_shared<PreparedList>(std::move(list)));
}

Result<void> Agent::release_list(std::uint64_t list) {
  lists_.take(list);
  return {};
}

Result<std::uint64_t> Agent::add_request(Op op, const PreparedList& remote, const Route& route, BuiltPlan built,
                                         std::optional<std::string> message) {
  Request::Parts parts;
  parts.runtime = runtime_.get();
  parts.peer = remote.peer;
  parts.link = route.remote->link;
  parts.asked = route.asked;
  parts.slot = route.slot();
  parts.op = op;
  parts.message = std::move(message);
  if (!parts.slot->notifier && !remote.peer->is_self)
    parts.send_message = [this](Peer& to, std::string_view text) { return send_to(to, text, slots()); };
  NIXL_ASSIGN(auto made, Request::make(std::move(parts), std::move(built)));
  return requests_.add(std::move(made));
}

Result<std::uint64_t> Agent::make_request(Op op, std::uint64_t local, std::span<const std::int64_t> local_index,
                                          std::uint64_t remote, std::span<const std::int64_t> remote_index,
                                          std::optional<std::string> message, BackendIds backends, bool merge) {
  const TracedCall traced(tracer_, "make_request");
  NIXL_TRY(usable());
  const auto mine = lists_.get(local), other = lists_.get(remote);
  if (!mine || !other)
    return fail(Code::kInvalidArgument, "%s handle 0x%llx is not a prepared list of agent '%s'",
                mine ? "remote" : "local", static_cast<unsigned long long>(mine ? remote : local), name().c_str());
  if (!mine->local)
    return fail(Code::kInvalidArgument, "the local side was prepared for agent '%s'", mine->peer->name.c_str());
  if (other->local) return fail(Code::kInvalidArgument, "the remote side was prepared as a local list");
  runtime_->handle_lost();
  if (other->peer->state != Peer::State::kAlive)
    return fail(Code::kNotFound, "agent '%s' was removed or lost since its list was prepared",
                other->peer->name.c_str());
  Result<Route> route = fail(Code::kInternal, "no route");
  if (backends.empty()) {
    route = choose_route(*mine, *other);
  } else {
    NIXL_ASSIGN(const std::vector<Slot*> allowed, chosen(backends, true));
    PreparedList limited_mine = *mine, limited_other = *other;
    const auto not_allowed = [&](const auto& side) {
      return std::find(allowed.begin(), allowed.end(), side.slot) == allowed.end();
    };
    std::erase_if(limited_mine.ours, not_allowed);
    std::erase_if(limited_other.theirs, not_allowed);
    route = choose_route(limited_mine, limited_other);
    if (route) {  // point into the lists that stay
      for (const auto& side : mine->ours)
        if (side.slot == route->slot()) route->local = &side;
      for (const auto& side : other->theirs)
        if (side.slot == route->slot()) route->remote = &side;
    }
  }
  if (!route) return fail(Code::kInvalidArgument, "%s", route.error().reason.c_str());
  NIXL_ASSIGN(BuiltPlan built, build_plan(*mine, local_index, *other, remote_index, *route, merge));
  return add_request(op, *other, *route, std::move(built), std::move(message));
}

Result<std::uint64_t> Agent::make_request(Op op, Descs local, Descs remote, const std::string& agent,
                                          std::optional<std::string> message, BackendIds backends) {
  const TracedCall traced(tracer_, "make_request");
  NIXL_ASSIGN(const std::vector<Slot*> allowed, chosen(backends, true));
  NIXL_TRY(peer(agent));
  NIXL_ASSIGN(const PreparedList mine, prepare_local(std::move(local), allowed));
  NIXL_ASSIGN(const PreparedList theirs, remote_list(agent, remote, allowed));
  NIXL_ASSIGN(const Route route, choose_route(mine, theirs));
  NIXL_ASSIGN(BuiltPlan built, build_plan(mine, theirs, route));
  return add_request(op, theirs, route, std::move(built), std::move(message));
}

Result<std::shared_ptr<Request>> Agent::request(std::uint64_t handle) const {
  NIXL_TRY(usable());
  auto found = requests_.get(handle);
  if (!found)
    return fail(Code::kInvalidArgument, "0x%llx is no transfer handle of agent '%s': %s",
                static_cast<unsigned long long>(handle), name().c_str(),
                lists_.get(handle) ? "it is a prepared list" : "it was released, or another agent made it");
  return found;
}

Result<void> Agent::release_request(std::uint64_t handle) {
  if (!usable()) return {};
  const auto found = requests_.get(handle);
  if (!found) return {};
  NIXL_TRY(found->release());
  requests_.take(handle);
  return {};
}

// ---- notifications

Result<void> Agent::send_to(Peer& to, std::string_view message, const std::vector<Slot*>& allowed) {
  bool any_notifier = false;
  for (Slot* candidate : allowed) {
    if (candidate->is_companion) continue;
    for (Slot* by : {candidate->companion, candidate}) {
      if (!by || !by->notifier) continue;
      any_notifier = true;
      PeerLink* link = to.link(*by);
      if (!link || !link->connection || !link->usage.acquire()) continue;
      auto sent = by->notifier->send(*link->connection, message);
      link->release();
      if (!sent && sent.error().code == Code::kPeerLost) runtime_->peer_lost({to.name, to.incarnation}, sent.error());
      return sent;
    }
  }
  if (!any_notifier)
    return fail(Code::kIo, "no backend of agent '%s' carries notifications %s", name().c_str(), asked(allowed).c_str());
  return fail(Code::kNotFound, "agent '%s' shares no notification backend with agent '%s'", to.name.c_str(),
              name().c_str());
}

Result<void> Agent::send_notification(const std::string& agent, std::string_view message, BackendIds backends) {
  NIXL_ASSIGN(const std::vector<Slot*> allowed, chosen(backends, false));
  if (agent == name()) {
    runtime_->deliver_to_self(std::string(message));
    return {};
  }
  NIXL_ASSIGN(const auto to, peer(agent));
  if (tracer_) tracer_->mark(("notify " + agent).c_str(), message.size());
  auto sent = send_to(*to, message, allowed);
  if (!runtime_->has_thread()) runtime_->drive();  // the message is on its way meanwhile
  return sent;
}

Result<std::vector<Notification>> Agent::drain_notifications(BackendIds backends) {
  std::vector<Notification> out;
  if (backends.empty()) {
    NIXL_TRY(usable());
    runtime_->drain(nullptr, out);
  } else {
    NIXL_ASSIGN(const std::vector<Slot*> allowed, chosen(backends, true));
    runtime_->drain(&allowed, out);
  }
  runtime_->handle_lost();
  return out;
}

}  // namespace nixl::core
