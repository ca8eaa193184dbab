#include "backends/libfabric/callers.h"

#include <algorithm>

namespace nixl::core::libfabric {
namespace {

constexpr Nanoseconds kStuck =
    10'000'000'000;  // messages that do not leave; what they say is repeated to who calls again
constexpr Nanoseconds kLook = 1'000'000'000;

}  // namespace

Callers::~Callers() {
  for (auto& [key, caller] : callers_)
    for (auto& [index, path] : caller.paths) end_path_locked(path);
}

void Callers::end_path_locked(Path& path) {
  Rail& rail = path.outbox->rail();
  const fi_addr_t peer = path.outbox->peer();
  path.outbox.reset();
  rail.remove_locked(peer);
}

Result<Outbox*> Callers::path_locked(const Key& key, Caller& caller, Rail& rail, const Hello& hello) {
  const std::uint32_t index = hello.path;
  if (const auto found = caller.paths.find(index); found != caller.paths.end()) {
    if (found->second.address == hello.address && &found->second.outbox->rail() == &rail)
      return found->second.outbox.get();
    end_path_locked(found->second);
    caller.paths.erase(found);
  }
  NIXL_ASSIGN(const fi_addr_t peer, rail.insert_locked(hello.address));
  Path& path = caller.paths[index];
  path.address = hello.address;
  path.outbox = std::make_unique<Outbox>(*engine_, rail, peer,
                                         [this, key, index](const Error&) { drop_path_locked(key, index); });
  return path.outbox.get();
}

Result<void> Callers::hello_locked(Rail& rail, const Hello& hello, const std::vector<std::string>& first) {
  if (hello.path >= kMaxRailsOfPeer) return fail(Code::kMismatch, "hello over path %u", hello.path);
  const Key key{hello.incarnation, hello.link};
  const bool was_forgotten = !callers_.contains(key) && next_sequence_.contains(key);
  Caller& caller = callers_[key];
  auto outbox = path_locked(key, caller, rail, hello);
  if (!outbox) {
    if (caller.paths.empty()) callers_.erase(key);
    return fail(std::move(outbox.error()));
  }
  caller.name = hello.name;
  if (caller.attempt != hello.attempt) {
    caller.attempt = hello.attempt;
    caller.control = hello.path;
    caller.partial.clear();
  }
  if (hello.attempt > 1 || was_forgotten)
    for (const std::string& bytes : first) (*outbox)->post_locked(bytes);
  // Whoever was expected here and is not: the answer carries our own incarnation, and the caller draws the conclusion.
  (*outbox)->post_locked(encode(HelloAck{hello.link, incarnation_, next_sequence_[key], hello.path, hello.attempt}));
  return {};
}

// A caller that cannot be answered is forgotten until it calls again.
void Callers::drop_path_locked(const Key& key, std::uint32_t index) {
  const auto caller = callers_.find(key);
  if (caller == callers_.end()) return;
  const auto path = caller->second.paths.find(index);
  if (path == caller->second.paths.end()) return;
  end_path_locked(path->second);
  caller->second.paths.erase(path);
  if (caller->second.paths.empty()) callers_.erase(caller);
}

void Callers::notify_locked(const Notify& notify, std::vector<Notification>& ready) {
  const Key key{notify.incarnation, notify.link};
  const auto found = callers_.find(key);
  if (found == callers_.end()) return;  // its link broke: it will call again, and send again
  Caller& caller = found->second;
  std::uint64_t& next = next_sequence_[key];
  if (notify.sequence < next) return;  // came before
  if (notify.offset == 0) caller.partial.clear();
  if (notify.sequence > next || notify.offset > caller.partial.size()) tell_gap_locked(key);
  if (notify.sequence > next || notify.offset != caller.partial.size()) return;
  caller.partial.append(notify.part);
  if (caller.partial.size() < notify.total) return;
  ready.push_back({caller.name, std::move(caller.partial)});
  caller.partial = {};
  ++next;
}

Outbox* Callers::control_locked(const LinkWord& word) {
  const auto found = callers_.find({word.incarnation, word.link});
  if (found == callers_.end() || found->second.paths.empty()) return nullptr;
  auto& paths = found->second.paths;
  const auto control = paths.find(found->second.control);
  return (control == paths.end() ? paths.begin() : control)->second.outbox.get();
}

void Callers::ping_locked(const LinkWord& word) {
  Outbox* const outbox = control_locked(word);
  if (!outbox || !outbox->idle_locked()) return;
  const Key key{word.incarnation, word.link};
  if (next_sequence_[key] < word.sequence)
    tell_gap_locked(key);
  else
    outbox->post_locked(encode(MessageKind::kPong, LinkWord{incarnation_, word.link, 0}));
}

// Providers open a broken connection again by themselves; what was in it is lost.
void Callers::tell_gap_locked(const Key& key) {
  if (Outbox* const outbox = control_locked({key.first, key.second, 0}))
    outbox->post_locked(encode(MessageKind::kGap, LinkWord{incarnation_, key.second, 0}));
}

void Callers::close_locked(const LinkWord& word) {
  const auto found = callers_.find({word.incarnation, word.link});
  if (found == callers_.end()) return;
  for (auto& [index, path] : found->second.paths) end_path_locked(path);
  callers_.erase(found);
  next_sequence_.erase({word.incarnation, word.link});  // a link that was closed is not opened again
}

void Callers::tell_all_locked(const std::string& bytes) {
  for (auto& [key, caller] : callers_)
    if (Outbox* const outbox = control_locked({key.first, key.second, 0})) outbox->post_locked(bytes);
}

Nanoseconds Callers::tick_locked(Nanoseconds now) {
  std::vector<std::pair<Key, std::uint32_t>> stuck;
  bool any_waits = false;
  for (const auto& [key, caller] : callers_)
    for (const auto& [index, path] : caller.paths) {
      const Nanoseconds since = path.outbox->waits_since();
      any_waits |= since != 0;
      if (since != 0 && now - since > kStuck) stuck.emplace_back(key, index);
    }
  for (const auto& [key, index] : stuck) drop_path_locked(key, index);
  return any_waits ? now + kLook : INT64_MAX;
}

bool Callers::idle_locked() const {
  return std::all_of(callers_.begin(), callers_.end(), [](const auto& caller) {
    return std::all_of(caller.second.paths.begin(), caller.second.paths.end(),
                       [](const auto& path) { return path.second.outbox->idle_locked(); });
  });
}

}  // namespace nixl::core::libfabric
