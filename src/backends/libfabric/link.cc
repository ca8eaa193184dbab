#include "backends/libfabric/link.h"

#include <algorithm>
#include <atomic>
#include <utility>

#include "base/log.h"

namespace nixl::core::libfabric {
namespace {

constexpr Nanoseconds kMillisecond = 1'000'000;
constexpr std::size_t kHistoryBytes = 256 << 10;  // of sent notifications kept for the case that the link breaks
constexpr int kMostFailures = 3;                  // of a path without an answer between them
constexpr Nanoseconds kBeforeAgain = 20 * kMillisecond;
constexpr Nanoseconds kKnockLook = 5 * kMillisecond;
constexpr Nanoseconds kHelloEvery = 1000 * kMillisecond;  // where neither an answer nor an error comes
// Most providers tell of a dead peer only when something is sent to it.
constexpr Nanoseconds kPingBusy = 1000 * kMillisecond, kPingIdle = 5000 * kMillisecond;
constexpr Nanoseconds kStuck = 100 * kMillisecond;       // a message that does not leave
constexpr Nanoseconds kSilence = 30'000 * kMillisecond;  // of a peer whose own thread would answer

std::uint64_t next_link_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace

Link::Link(Engine& engine, LinkOwner& owner, const Settings& settings, PeerId peer, bool driven)
    : engine_(&engine),
      owner_(&owner),
      settings_(&settings),
      peer_(std::move(peer)),
      driven_(driven),
      id_(next_link_id()) {}

Result<std::unique_ptr<Link>> Link::open_locked(Engine& engine, LinkOwner& owner, const Settings& settings,
                                                const PeerId& peer, bool driven, const std::vector<Target>& targets) {
  std::unique_ptr<Link> link(new Link(engine, owner, settings, peer, driven));
  for (const Target& target : targets) NIXL_TRY(link->add_path_locked(target));
  link->deadline_ = now_ns() + settings.connect_ns;
  for (Path& path : link->paths_) link->say_hello_locked(path);
  return link;
}

Link::~Link() {
  drop_locked();
}

Result<void> Link::add_path_locked(const Target& target) {
  NIXL_ASSIGN(const fi_addr_t peer, target.rail->insert_locked(target.address));
  Path& path = paths_.emplace_back();
  path.rail = target.rail;
  path.remote_rail = target.remote_rail;
  path.address = target.address;
  path.peer = peer;
  path.outbox = std::make_unique<Outbox>(*engine_, *target.rail, peer,
                                         [this, &path](const Error& why) { path_failed_locked(path, why); });
  return {};
}

void Link::drop_locked() noexcept {
  for (Path& path : paths_) {
    path.outbox.reset();
    path.rail->remove_locked(path.peer);
  }
  paths_.clear();
}

void Link::post_hello_locked(Path& path, std::size_t index) {
  path.outbox->post_locked(
      encode(Hello{peer_.incarnation, settings_->self.incarnation, id_, static_cast<std::uint32_t>(index), attempt_,
                   settings_->self.name, path.rail->address()}));
}

void Link::say_hello_locked(Path& path) {
  const auto index = static_cast<std::size_t>(
      std::find_if(paths_.begin(), paths_.end(), [&](const Path& p) { return &p == &path; }) - paths_.begin());
  path.again_at = now_ns() + kHelloEvery;
  path.outbox->clear_locked();
  post_hello_locked(path, index);
  engine_->tick_at_locked(std::min(path.again_at, deadline_));
  if (++path.num_hellos == 1 || !path.rail->addresses_are_tcp_ports()) return;
  path.knock.start(path.address);
  engine_->tick_at_locked(now_ns() + kKnockLook);
}

// A message over the path could not be sent.
void Link::path_failed_locked(Path& path, const Error& why) {
  if (state_ == State::kLost) return;
  if (state_ == State::kReady) {
    if (path.up) broke_locked(why);
    return;
  }
  why_ = why;
  ++path.num_failures;
  path.again_at = now_ns() + kBeforeAgain * path.num_failures;
  engine_->tick_at_locked(path.again_at);
}

void Link::broke_locked(const Error& why) {
  if (state_ != State::kReady) return;
  if (owner_->surely_gone(peer_)) {
    lose_locked(Error{Code::kPeerLost, "agent '" + peer_.name + "' is gone: " + why.reason});
    return;
  }
  NIXL_INFO("agent '%s': %s; connecting again", peer_.name.c_str(), why.reason.c_str());
  why_ = why;
  deadline_ = now_ns() + std::max<Nanoseconds>(settings_->reconnect_ns, 1);
  state_ = State::kConnecting;
  const std::vector<LinkJob*> jobs = jobs_;
  for (LinkJob* const job : jobs) job->link_down_locked();
  ask_again_locked();
}

void Link::ask_again_locked() {
  ++attempt_;
  for (Path& path : paths_) {
    path.up = false;
    path.num_failures = 0;
    say_hello_locked(path);
  }
}

void Link::acknowledged_locked(const HelloAck& ack) {
  heard_locked();
  if (state_ == State::kLost || ack.attempt != attempt_ || ack.path >= paths_.size()) return;
  if (ack.incarnation != peer_.incarnation) {
    lose_locked(Error{Code::kPeerLost, "agent '" + peer_.name + "' is gone: another agent answers at its address"});
    return;
  }
  Path& path = paths_[ack.path];
  path.up = true;
  path.again_at = 0;
  if (state_ == State::kReady) return;  // one rail more
  const std::uint64_t oldest = history_.empty() ? next_sequence_ : history_.front().sequence;
  if (ack.next_sequence < oldest) {
    lose_locked(Error{Code::kPeerLost, "the link to agent '" + peer_.name + "' broke and " +
                                           std::to_string(oldest - ack.next_sequence) +
                                           " notifications sent before may not have arrived"});
    return;
  }
  control_ = ack.path;
  state_ = State::kReady;
  used_ = true;
  ping_at_ = now_ns() + kPingBusy;
  engine_->tick_at_locked(ping_at_);
  next_to_send_ = std::min(ack.next_sequence, next_sequence_);
  send_history_locked();
  const std::vector<LinkJob*> jobs = jobs_;
  for (LinkJob* const job : jobs) job->link_up_locked();
}

void Link::gap_locked() {
  broke_locked(Error{Code::kPeerLost, "notifications were lost on the way"});
}

void Link::dismissed_locked() {
  dismissed_ = true;
  lose_locked(Error{Code::kPeerLost, "agent '" + peer_.name + "' left"});
}

void Link::lose_locked(Error why) {
  if (state_ == State::kLost) return;
  state_ = State::kLost;
  why_ = std::move(why);
  for (Path& path : paths_) {
    path.up = false;
    path.outbox->clear_locked();
  }
  history_.clear();
  const std::vector<LinkJob*> jobs = jobs_;
  for (LinkJob* const job : jobs) job->link_lost_locked(why_);
  owner_->link_lost_locked(*this);
}

void Link::close_locked(Nanoseconds linger) {
  if (state_ == State::kReady) {
    control().post_locked(encode(MessageKind::kClose, LinkWord{settings_->self.incarnation, id_, 0}));
    const Deadline deadline = Deadline::after(linger);
    while (state_ == State::kReady && !control().idle_locked() && !deadline.passed()) (void)engine_->progress_locked();
  }
  state_ = State::kLost;
  const std::vector<LinkJob*> jobs = std::exchange(jobs_, {});
  for (LinkJob* const job : jobs) job->abandon_locked();
  drop_locked();
}

void Link::excuse_locked(Nanoseconds time) noexcept {
  deadline_ += time;
  heard_at_ += time;
}

Nanoseconds Link::tick_locked(Nanoseconds now) {
  if (state_ == State::kConnecting) return tick_connecting_locked(now);
  return state_ == State::kReady ? tick_ready_locked(now) : INT64_MAX;
}

// A peer that was never heard of need not be a dead one.
Error Link::no_answer(bool refused, bool again) const {
  const std::string wait = std::to_string((again ? settings_->reconnect_ns : settings_->connect_ns) / kMillisecond);
  return Error{refused || again ? Code::kPeerLost : Code::kIo,
               "agent '" + peer_.name + "' " +
                   (refused ? "refuses to be reached" : "did not answer within " + wait + " ms") + " over " +
                   describe() + (why_.reason.empty() ? "" : ": " + why_.reason)};
}

Nanoseconds Link::tick_connecting_locked(Nanoseconds now) {
  for (Path& path : paths_)
    if (path.knock.refused()) path.num_failures = kMostFailures;
  const bool given_up =
      std::all_of(paths_.begin(), paths_.end(), [](const Path& path) { return path.num_failures >= kMostFailures; });
  const bool again = attempt_ > 1;
  if (given_up || now >= deadline_ || (again && owner_->surely_gone(peer_))) {
    lose_locked(no_answer(given_up, again));
    return INT64_MAX;
  }
  Nanoseconds next = deadline_;
  for (Path& path : paths_) {
    if (path.num_failures >= kMostFailures) continue;
    if (now >= path.again_at) say_hello_locked(path);
    next = std::min(next, path.knock.under_way() ? now + kKnockLook : path.again_at);
  }
  return next;
}

// Paths that have not answered are left alone. A peer that answers nothing at all is given up.
Nanoseconds Link::tick_ready_locked(Nanoseconds now) {
  Path& path = paths_[control_];
  if (path.knock.refused()) {
    lose_locked(Error{Code::kPeerLost, "agent '" + peer_.name + "' refuses to be reached over " + describe()});
    return INT64_MAX;
  }
  // What cannot leave may be waiting for a connection that the provider tries to open again.
  if (path.outbox->waits_since() != 0 && now - path.outbox->waits_since() > kStuck &&
      path.rail->addresses_are_tcp_ports())
    path.knock.start(path.address);
  const Nanoseconds look = path.knock.under_way()            ? now + kKnockLook
                           : path.outbox->waits_since() != 0 ? now + kStuck
                                                             : INT64_MAX;
  if (now < ping_at_) return std::min(ping_at_, look);
  if (driven_ && now - heard_at_ > kSilence) {
    lose_locked(Error{Code::kPeerLost, "agent '" + peer_.name + "' has been silent for " +
                                           std::to_string(kSilence / kMillisecond) + " ms over " + describe()});
    return INT64_MAX;
  }
  if (owner_->surely_gone(peer_)) {
    lose_locked(Error{Code::kPeerLost, "agent '" + peer_.name + "' is gone: its process has ended"});
    return INT64_MAX;
  }
  for (const Path& other : paths_)
    if (!other.up && other.outbox->waits_since() != 0 && now - other.outbox->waits_since() > settings_->connect_ns)
      other.outbox->clear_locked();  // it leads nowhere
  if (control().idle_locked()) {
    // A peer that has forgotten us, because it could not reach us for a while, does not answer before we have called again.
    if (heard_at_ < pinged_at_)
      post_hello_locked(path, control_);
    else
      control().post_locked(encode(MessageKind::kPing, LinkWord{settings_->self.incarnation, id_, next_to_send_}));
    pinged_at_ = now;
  }
  ping_at_ = now + (jobs_.empty() ? kPingIdle : kPingBusy);
  return std::min(ping_at_, look);
}

void Link::join_locked(LinkJob& job) {
  jobs_.push_back(&job);
  used_ = true;
  if (state_ != State::kReady) return;
  ping_at_ = std::min(ping_at_, now_ns() + kPingBusy);
  engine_->tick_at_locked(ping_at_);
}

std::vector<const Link::Path*> Link::paths_up() const {
  std::vector<const Path*> list;
  for (const Path& path : paths_)
    if (path.up) list.push_back(&path);
  return list;
}

std::string Link::describe() const {
  std::string text;
  for (const Path& path : paths_)
    if (path.up || state_ != State::kReady) text += (text.empty() ? "" : "+") + path.rail->label();
  return text;
}

Result<void> Link::notify_locked(std::string_view text) {
  if (state_ == State::kLost) return fail(why_);
  used_ = true;
  history_bytes_ += text.size();
  history_.push_back({next_sequence_++, std::string(text)});
  if (state_ == State::kReady) send_history_locked();
  return {};
}

void Link::send_history_locked() {
  constexpr std::size_t kPartBytes = kFrameBytes - kNotifyHeaderBytes;
  for (; next_to_send_ < next_sequence_; ++next_to_send_) {
    const Sent& sent = history_[next_to_send_ - history_.front().sequence];
    std::size_t at = 0;
    do {
      const std::string_view part = std::string_view(sent.text).substr(at, kPartBytes);
      control().post_locked(
          encode(Notify{settings_->self.incarnation, id_, sent.sequence, sent.text.size(), at, part}));
      at += part.size();
    } while (at < sent.text.size());
  }
  while (history_bytes_ > kHistoryBytes && !history_.empty() && history_.front().sequence < next_to_send_) {
    history_bytes_ -= history_.front().text.size();
    history_.pop_front();
  }
}

}  // namespace nixl::core::libfabric
