// nixl::Agent: the public class over core::Agent. Every member is a call and a translation of its error.
#include <nixl/agent.h>

#include <algorithm>

#include "agent/agent.h"
#include "agent/desc_codec.h"
#include "agent/telemetry.h"
#include "base/log.h"
#include "tables.h"

namespace nixl {
namespace {

constexpr const char* kStatusNames[] = {
    "NIXL_ERR_NOT_POSTED",    "NIXL_ERR_INVALID_PARAM",     "NIXL_ERR_BACKEND",       "NIXL_ERR_NOT_FOUND",
    "NIXL_ERR_MISMATCH",      "NIXL_ERR_NOT_ALLOWED",       "NIXL_ERR_REPOST_ACTIVE", "NIXL_ERR_UNKNOWN",
    "NIXL_ERR_NOT_SUPPORTED", "NIXL_ERR_REMOTE_DISCONNECT", "NIXL_ERR_CANCELED",      "NIXL_ERR_NO_TELEMETRY"};
constexpr core::Nanoseconds kConnectTime = 10'000'000'000;

[[noreturn]] void raise(const core::Error& error) {
  throw Error(core::status_of(error.code), error.reason);
}

template <typename T>
T unwrap(core::Result<T> result) {
  if (!result) raise(result.error());
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

XferState state_of(core::Result<bool> done) {
  return unwrap(std::move(done)) ? XferState::DONE : XferState::PROC;
}

core::Op op_of(OpType op) {
  if (op != OpType::READ && op != OpType::WRITE)
    throwInvalid("operation " + std::to_string(static_cast<int>(op)) + " is unknown; known: READ (0), WRITE (1)");
  return op == OpType::READ ? core::Op::kRead : core::Op::kWrite;
}

// The core counts backends from 0.
std::vector<std::uint32_t> places(const Agent::BackendIds& ids) {
  std::vector<std::uint32_t> list;
  for (const Agent::BackendId id : ids) {
    if (id == 0) throwInvalid("backend number 0 is none; they count from 1");
    list.push_back(id - 1);
  }
  return list;
}

MemType checked(MemType type) {
  if (static_cast<int>(type) < 0 || static_cast<int>(type) >= core::kNumMemKinds)
    throwInvalid("memory type " + std::to_string(static_cast<int>(type)) + " is unknown; 0 to " +
                 std::to_string(core::kNumMemKinds - 1) + " are known");
  return type;
}

// Everything inside counts on columns of one length.
const Descs& checked(const Descs& descs) {
  checked(descs.type);
  const std::size_t rows = descs.rows(), runs = descs.count.size();
  if (descs.len.size() != rows || descs.dev.size() != rows || descs.stride.size() != runs ||
      (runs != 0 && runs != rows) || (!descs.meta.empty() && descs.meta.size() != rows))
    throwInvalid("columns of " + std::to_string(rows) + " addresses, " + std::to_string(descs.len.size()) +
                 " lengths, " + std::to_string(descs.dev.size()) + " devices, " + std::to_string(descs.stride.size()) +
                 " strides, " + std::to_string(runs) + " counts, " + std::to_string(descs.meta.size()) +
                 " texts: the first three must have one length, the others the same or none");
  return descs;
}

Descs columns(const std::vector<MemDescriptor>& list) {
  Descs descs(list.empty() ? MemType::DRAM : checked(list[0].type));
  for (const MemDescriptor& desc : list) {
    if (desc.type != descs.type) throwInvalid("one side of a transfer mixes kinds of memory; each side has one");
    descs.add(desc.addr, desc.len, desc.dev_id, desc.meta);
  }
  return descs;
}

}  // namespace

Error::Error(int code, const std::string& reason)
    : std::runtime_error(std::string(nameOf(code)) + (reason.empty() ? "" : ": " + reason)),
      code_(code),
      reason_(reason) {}

const char* Error::nameOf(int code) noexcept {
  return code <= -1 && code >= -12 ? kStatusNames[-code - 1] : "BAD_STATUS";
}

void throwInvalid(const std::string& reason) {
  throw Error(-2, reason);
}

std::string packDescs(const Descs& descs, std::uint8_t list_class) {
  if (descs.rows() > UINT32_MAX)
    throwInvalid("the list has " + std::to_string(descs.rows()) + " rows; at most 4294967295 can be packed");
  return core::encode_descs(descs, list_class);
}
Descs unpackDescs(const char* bytes, std::size_t size, std::uint8_t& list_class) {
  return unwrap(core::decode_descs({bytes, size}, list_class));
}

class AgentImpl {
 public:
  ~AgentImpl() {
    if (core && core->is_elsewhere()) (void)core.release();
  }
  std::unique_ptr<core::Agent> core;
  AgentConfig config;
};

struct XferRecord {
  std::weak_ptr<AgentImpl> owner;
  Agent::Handle handle = 0;
  ~XferRecord() {
    if (const auto impl = owner.lock()) (void)impl->core->release_request(handle);
  }
};

struct RegRecord {
  std::weak_ptr<AgentImpl> owner;
  std::vector<Descs> lists;
  Agent::BackendIds backends;
};

Agent::Agent(std::string name, AgentConfig config) : impl_(std::make_shared<AgentImpl>()) {
  if (name.empty()) throw std::invalid_argument("the agent's name is empty");
  core::AgentOptions options;
  options.name = std::move(name);
  options.progress_thread = config.enable_prog_thread;
  options.listen = config.enable_listen;
  options.listen_port = config.listen_port;
  options.use_etcd = config.use_etcd;
  options.capture_telemetry = config.capture_telemetry;
  options.watch_timeout_ns = std::chrono::nanoseconds(config.etcd_watch_timeout).count();
  auto opened = core::Agent::open(std::move(options), core::process_catalog());
  if (!opened && opened.error().code == core::Code::kInvalidArgument)
    throw std::invalid_argument(opened.error().reason);
  impl_->core = unwrap(std::move(opened));
  impl_->config = std::move(config);
  for (const std::string& backend : impl_->config.backends) {
    auto entry = impl_->core->catalog().find(backend);
    if (!entry) {
      NIXL_WARN("agent %s: backend %s is skipped: %s", impl_->core->name().c_str(), backend.c_str(),
                entry.error().reason.c_str());
      continue;
    }
    addBackend(backend);
  }
}

Agent::~Agent() = default;

const std::string& Agent::name() const noexcept {
  return impl_->core->name();
}

// ---- backends

Agent::BackendId Agent::addBackend(const std::string& backend, const Params& params) {
  const AgentConfig& config = impl_->config;
  core::Params merged;
  const auto canonical = [&](const std::string& name) { return impl_->core->catalog().canonical(name); };
  if (config.num_threads > 0)
    if (const auto entry = impl_->core->catalog().find(backend); entry && !(*entry)->threads_param.empty())
      merged[(*entry)->threads_param] = std::to_string(config.num_threads);
  for (const auto& [name, given] : config.backend_params)
    if (canonical(name) == canonical(backend))
      for (const auto& [key, value] : given) merged[key] = value;
  for (const auto& [key, value] : params) merged[key] = value;
  return unwrap(impl_->core->create_backend(backend, merged)) + 1;
}

void Agent::createBackend(const std::string& backend, const Params& params) {
  addBackend(backend, params);
}

std::vector<std::string> Agent::pluginList() const {
  return impl_->core->catalog().viable();
}

std::vector<std::pair<std::string, Agent::BackendId>> Agent::backendsHeld() const {
  std::vector<std::pair<std::string, BackendId>> list;
  for (std::uint32_t id = 0; const core::Slot* slot = impl_->core->slot(id); ++id)
    if (!slot->is_companion) list.emplace_back(slot->name(), id + 1);
  return list;
}

namespace {
core::Slot& slot_of(core::Agent& agent, Agent::BackendId id) {
  core::Slot* slot = agent.slot(id - 1);
  if (!slot || slot->is_companion)
    throwInvalid("backend number " + std::to_string(id) + " was not created by this agent");
  return *slot;
}
}  // namespace

Params Agent::backendParams(BackendId backend) const {
  const core::Slot& slot = slot_of(*impl_->core, backend);
  return {slot.params.begin(), slot.params.end()};
}

std::vector<MemType> Agent::backendMems(BackendId backend) const {
  const core::KindSet kinds = slot_of(*impl_->core, backend).abilities().registrable();
  std::vector<MemType> list;
  for (int kind = 0; kind < core::kNumMemKinds; ++kind)
    if (kinds.has(static_cast<core::MemKind>(kind))) list.push_back(static_cast<MemType>(kind));
  return list;
}

namespace {
Agent::BackendIds ids_of(const core::Agent& agent, const std::string& backend) {
  if (backend.empty()) return {};
  const core::Slot* slot = agent.slot(backend);
  if (!slot) throw Error(-4, "backend '" + backend + "' was not created by agent '" + agent.name() + "'");
  return {slot->id + 1};
}
}  // namespace

// ---- memory

void Agent::registerDescs(const Descs& descs, const BackendIds& backends) {
  unwrap(impl_->core->register_memory(checked(descs), places(backends)));
}
void Agent::deregisterDescs(const Descs& descs, const BackendIds& backends) {
  unwrap(impl_->core->deregister_memory(checked(descs), places(backends)));
}

RegHandle Agent::registerMemory(const std::vector<MemDescriptor>& descs, const std::string& backend) {
  auto record = std::make_shared<RegRecord>();
  record->owner = impl_;
  record->backends = ids_of(*impl_->core, backend);
  for (const MemDescriptor& desc : descs) {
    auto place = std::find_if(record->lists.begin(), record->lists.end(),
                              [&](const Descs& list) { return list.type == checked(desc.type); });
    if (place == record->lists.end()) place = record->lists.insert(place, Descs(checked(desc.type)));
    place->add(desc.addr, desc.len, desc.dev_id, desc.meta);
  }
  for (std::size_t i = 0; i < record->lists.size(); ++i) {
    auto added = impl_->core->register_memory(record->lists[i], places(record->backends));
    if (added) continue;
    while (i) (void)impl_->core->deregister_memory(record->lists[--i], places(record->backends));
    raise(added.error());
  }
  RegHandle handle;
  handle.record_ = std::move(record);
  return handle;
}

void Agent::deregisterMemory(const RegHandle& memory) {
  if (!memory) return;
  std::vector<Descs> lists = std::exchange(memory.record_->lists, {});
  const auto owner = memory.record_->owner.lock();
  if (!owner) return;
  if (owner != impl_) {
    memory.record_->lists = std::move(lists);
    throwInvalid("the memory was registered by agent '" + owner->core->name() + "'");
  }
  for (const Descs& list : lists) unwrap(impl_->core->deregister_memory(list, places(memory.record_->backends)));
}

std::vector<std::optional<Params>> Agent::queryMemory(const Descs& descs, BackendId backend) {
  std::vector<std::optional<Params>> out;
  for (auto& answer : unwrap(impl_->core->query_memory(checked(descs), places({backend})[0])))
    out.push_back(answer ? std::optional<Params>({answer->begin(), answer->end()}) : std::nullopt);
  return out;
}

// ---- transfers

Agent::Handle Agent::prepareDescs(const std::string& agent, Descs descs, const BackendIds& backends) {
  checked(descs);
  return unwrap(impl_->core->prepare_list(agent, std::move(descs), places(backends)));
}
void Agent::releaseDescs(Handle list) {
  unwrap(impl_->core->release_list(list));
}

Agent::Handle Agent::makeTransfer(OpType op, Handle local, Indices local_index, Handle remote, Indices remote_index,
                                  std::optional<std::string> notif, const BackendIds& backends, bool merge) {
  return unwrap(impl_->core->make_request(op_of(op), local, {local_index.data, local_index.size}, remote,
                                          {remote_index.data, remote_index.size}, std::move(notif), places(backends),
                                          merge));
}
Agent::Handle Agent::makeTransfer(OpType op, Descs local, Descs remote, const std::string& agent,
                                  std::optional<std::string> notif, const BackendIds& backends) {
  checked(local);
  checked(remote);
  return unwrap(impl_->core->make_request(op_of(op), std::move(local), std::move(remote), agent, std::move(notif),
                                          places(backends)));
}
XferState Agent::post(Handle transfer, const std::string* notif) {
  return state_of(
      unwrap(impl_->core->request(transfer))->post(notif ? std::optional<std::string_view>(*notif) : std::nullopt));
}
XferState Agent::check(Handle transfer) {
  return state_of(unwrap(impl_->core->request(transfer))->check());
}
XferState Agent::wait(Handle transfer, std::chrono::nanoseconds timeout) {
  return state_of(unwrap(impl_->core->request(transfer))->wait(core::Deadline::after(timeout.count())));
}
void Agent::cancel(Handle transfer) {
  unwrap(unwrap(impl_->core->request(transfer))->cancel());
}
void Agent::release(Handle transfer) {
  unwrap(impl_->core->release_request(transfer));
}

XferTelemetry Agent::telemetry(Handle transfer) {
  const auto request = unwrap(impl_->core->request(transfer));
  if (!impl_->core->telemetry_on())
    throw Error(-12, "telemetry is off: build the agent with capture_telemetry, or set NIXL_TELEMETRY_ENABLE=y");
  const core::TransferTimes times = unwrap(request->times());
  return {times.start_us, times.post_us, times.transfer_us, times.total_bytes, times.num_descs, request->backend()};
}
CostEstimate Agent::estimateCost(Handle transfer) {
  const core::CostEstimate cost = unwrap(unwrap(impl_->core->request(transfer))->estimate());
  return {cost.duration_us, cost.error_margin_us};
}
Agent::BackendId Agent::backendOf(Handle transfer) {
  return unwrap(impl_->core->request(transfer))->backend_id() + 1;
}
std::string Agent::pathOf(Handle transfer) {
  return unwrap(unwrap(impl_->core->request(transfer))->path());
}

namespace {
Agent::Handle handle_of(const std::shared_ptr<XferRecord>& record, const std::shared_ptr<AgentImpl>& impl) {
  if (!record) throwInvalid("the transfer handle is empty");
  const auto owner = record->owner.lock();
  if (!owner) throw Error(-6, "the agent of this transfer handle is gone");
  if (owner != impl) throwInvalid("the transfer belongs to agent '" + owner->core->name() + "'");
  return record->handle;
}
}  // namespace

XferHandle Agent::prepareTransfer(OpType op, const std::vector<MemDescriptor>& local,
                                  const std::vector<MemDescriptor>& remote, const std::string& remote_agent,
                                  const std::string& backend, const std::string& notif) {
  auto record = std::make_shared<XferRecord>();
  record->handle =
      makeTransfer(op, columns(local), columns(remote), remote_agent,
                   notif.empty() ? std::nullopt : std::optional<std::string>(notif), ids_of(*impl_->core, backend));
  record->owner = impl_;
  XferHandle handle;
  handle.record_ = std::move(record);
  return handle;
}
XferState Agent::postTransfer(const XferHandle& transfer) {
  return post(handle_of(transfer.record_, impl_));
}
XferState Agent::checkTransfer(const XferHandle& transfer) {
  return check(handle_of(transfer.record_, impl_));
}
XferState Agent::waitTransfer(const XferHandle& transfer, std::chrono::milliseconds timeout) {
  return wait(handle_of(transfer.record_, impl_), timeout);
}
void Agent::releaseTransfer(const XferHandle& transfer) {
  if (transfer.record_ && !transfer.record_->owner.expired()) release(handle_of(transfer.record_, impl_));
}

// ---- other agents

std::string Agent::getMetadata() const {
  return unwrap(impl_->core->metadata());
}
std::string Agent::partialMetadata(const Descs& descs, bool connections, const BackendIds& backends) const {
  return unwrap(impl_->core->partial_metadata(checked(descs), connections, places(backends)));
}
std::string Agent::addRemoteAgent(const std::string& metadata) {
  return unwrap(impl_->core->load(metadata));
}
void Agent::removeRemoteAgent(const std::string& agent) {
  unwrap(impl_->core->remove(agent));
}
bool Agent::checkRemoteMetadata(const std::string& agent) {
  return impl_->core->check_peer(agent, nullptr).has_value();
}
void Agent::requirePeer(const std::string& agent, const Descs* descs) {
  if (descs) checked(*descs);
  unwrap(impl_->core->check_peer(agent, descs));
}

void Agent::sendLocalMetadata(const std::string& ip, std::uint16_t port) {
  unwrap(impl_->core->send_metadata(ip, port));
}
void Agent::sendPartialMetadata(const Descs& descs, bool connections, const BackendIds& backends, const std::string& ip,
                                std::uint16_t port, const std::string& label) {
  unwrap(impl_->core->send_partial(checked(descs), connections, places(backends), ip, port, label));
}
void Agent::fetchRemoteMetadata(const std::string& agent, const std::string& ip, std::uint16_t port) {
  fetchLabelled(agent, ip, port, "");
}
void Agent::fetchLabelled(const std::string& agent, const std::string& ip, std::uint16_t port,
                          const std::string& label) {
  unwrap(impl_->core->fetch(agent, ip, port, label));
}
void Agent::invalidateLocalMetadata(const std::string& ip, std::uint16_t port) {
  unwrap(impl_->core->invalidate(ip, port));
}

void Agent::makeConnection(const std::string& remote_agent) {
  connect(remote_agent, {}, std::chrono::nanoseconds(kConnectTime));
}
void Agent::connect(const std::string& agent, const BackendIds& backends, std::chrono::nanoseconds timeout) {
  unwrap(impl_->core->connect(agent, places(backends), timeout.count()));
}

void Agent::sendNotif(const std::string& remote_agent, const std::string& message) {
  notify(remote_agent, message, {});
}
void Agent::notify(const std::string& agent, const std::string& message, const BackendIds& backends) {
  unwrap(impl_->core->send_notification(agent, message, places(backends)));
}
std::vector<std::pair<std::string, std::string>> Agent::drainNotifs(const BackendIds& backends) {
  std::vector<std::pair<std::string, std::string>> out;
  for (core::Notification& item : unwrap(impl_->core->drain_notifications(places(backends))))
    out.emplace_back(std::move(item.sender), std::move(item.message));
  return out;
}
Notifs Agent::getNewNotifs() {
  Notifs map;
  for (auto& [sender, message] : drainNotifs({})) map[sender].push_back(std::move(message));
  return map;
}

int Agent::eventFd() {
  return unwrap(impl_->core->event_fd());
}
std::uint16_t Agent::listenPort() const noexcept {
  return impl_->core->listen_port();
}

Agent::Handle Agent::openView(const std::string& agent, const Descs& descs, const BackendIds& backends) {
  if (checked(descs).rows() == 0) throwInvalid("a memory view needs descriptors; the list is empty");
  if (!agent.empty()) unwrap(impl_->core->check_peer(agent, nullptr));
  std::string asked;
  for (const auto& [backend, id] : backendsHeld())
    if (backends.empty() || std::find(backends.begin(), backends.end(), id) != backends.end())
      asked += (asked.empty() ? "" : ", ") + backend;
  throw Error(-9, "no backend of agent '" + name() + "' (" + (asked.empty() ? "it has none" : asked) +
                      ") lets kernels use memory" + (agent.empty() ? "" : " of agent '" + agent + "'") +
                      " by themselves: transfers that a GPU starts are not in this release; post them from the host");
}

}  // namespace nixl
