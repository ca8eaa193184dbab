#include "backends/mooncake/line.h"

#include <sys/socket.h>

#include <algorithm>
#include <chrono>

#include "backends/mooncake/sockets.h"
#include "net/tcp.h"

namespace nixl::core::mooncake {
namespace {

constexpr Nanoseconds kCallTime = 10'000'000'000;    // for a connection and a welcome
constexpr Nanoseconds kDialTime = 500'000'000;       // one attempt: a stop is noticed in between
constexpr Nanoseconds kLastWordsTime = 500'000'000;  // for what a peer that has ended sent before
constexpr Nanoseconds kFlushTime = 1'000'000'000;    // of messages that wait at the end

}  // namespace

Result<std::unique_ptr<Line>> Line::open(const Owner& owner, const PeerId& peer, Contact contact) {
  NIXL_ASSIGN(net::Wakeup wakeup, net::Wakeup::open());
  std::unique_ptr<Line> line(new Line(owner, peer, std::move(contact), std::move(wakeup)));
  line->thread_ = std::thread([raw = line.get()] { raw->run(); });
  return line;
}

Result<std::unique_ptr<Line>> Line::open_to_self(const Owner& owner) {
  NIXL_ASSIGN(net::Wakeup wakeup, net::Wakeup::open());
  std::unique_ptr<Line> line(new Line(owner, owner.self, {}, std::move(wakeup)));
  NIXL_ASSIGN(line->segment_, owner.engine.open_segment(owner.engine.name()));
  line->state_ = State::kReady;
  return line;
}

Line::~Line() {
  if (thread_.joinable()) {
    std::unique_lock lock(mutex_);
    if (state_ == State::kReady)
      changed_.wait_for(lock, std::chrono::nanoseconds(kFlushTime),
                        [&] { return (queue_.empty() && !sending_) || state_ == State::kLost; });
    stopping_ = true;
    if (channel_) ::shutdown(channel_->fd(), SHUT_RDWR);  // wakes a send that the peer has no room for
    lock.unlock();
    wakeup_.wake();
    thread_.join();
    if (segment_ >= 0) owner_.engine.close_segment(segment_);
  }
}

Result<void> Line::wait_ready(Deadline deadline) {
  std::unique_lock lock(mutex_);
  while (state_ == State::kCalling && !deadline.passed())
    changed_.wait_for(lock, std::chrono::nanoseconds(std::min(deadline.left(), kCallTime)));
  if (state_ == State::kLost) return fail(why_);
  if (state_ == State::kCalling)
    return fail(Code::kTimeout, "agent '%s' has not answered at %s port %u yet", peer_.name.c_str(),
                contact_.address.c_str(), contact_.port);
  return {};
}

Result<void> Line::send(std::string_view message) {
  if (message.size() > kMaxMessage)
    return fail(Code::kInvalidArgument, "message of %zu bytes; Mooncake takes up to %zu", message.size(), kMaxMessage);
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kLost) return fail(why_);
    queue_.push_back(frame_of(FrameKind::kMessage, message));
  }
  wakeup_.wake();
  return {};
}

void Line::refresh() {
  if (!thread_.joinable()) return;  // our own memory the engine knows
  {
    const std::lock_guard lock(mutex_);
    if (state_ == State::kLost || stale_) return;
    stale_ = true;
  }
  wakeup_.wake();
}

Result<std::optional<int>> Line::segment() const {
  const std::lock_guard lock(mutex_);
  if (state_ == State::kLost) return fail(why_);
  if (state_ == State::kCalling || stale_ || reopening_) return std::nullopt;
  return segment_;
}

bool Line::lost() {
  if (lost_at_ != 0) return true;
  const std::lock_guard lock(mutex_);
  return channel_ && is_over(channel_->fd());
}

Error Line::why() const {
  const std::lock_guard lock(mutex_);
  if (state_ == State::kLost) return why_;
  return {Code::kPeerLost, "agent '" + peer_.name + "' has ended the connection"};
}

void Line::run() {
  auto done = call();
  if (done) done = serve();
  if (!stopping_) end(std::move(done).error());
}

void Line::end(Error why) {
  // Whoever hears of the end has been given everything that was said before it.
  owner_.office.wait_for_end(peer_.incarnation, Deadline::after(kLastWordsTime));
  why = {Code::kPeerLost, "agent '" + peer_.name + "' by Mooncake: " + why.reason};
  bool left;
  {
    const std::lock_guard lock(mutex_);
    state_ = State::kLost;
    lost_at_ = now_ns();
    why_ = why;
    queue_.clear();
    left = left_;
  }
  changed_.notify_all();
  owner_.news.wake();
  if (!owner_.events) return;
  if (left)
    owner_.events->peer_left(peer_, std::move(why));
  else
    owner_.events->peer_lost(peer_, std::move(why));
}

Result<net::Channel> Line::dial() {
  const Deadline deadline = Deadline::after(kCallTime);
  for (;;) {
    auto socket = net::connect_tcp({contact_.address, contact_.port}, Deadline::after(kDialTime));
    if (socket) {
      watch_over(socket->get());
      return net::Channel(std::move(*socket), kMaxFrame);
    }
    if (stopping_ || deadline.passed() || socket.error().code != Code::kTimeout) return fail(std::move(socket).error());
  }
}

Result<void> Line::call() {
  NIXL_ASSIGN(auto channel, dial());
  {
    const std::lock_guard lock(mutex_);
    channel_ = std::make_unique<net::Channel>(std::move(channel));
  }
  const Deadline deadline = Deadline::after(kCallTime);
  NIXL_TRY(channel_->send(Hello{owner_.self, contact_.incarnation}.encode(), deadline));
  NIXL_ASSIGN(const net::Message answer, channel_->receive(deadline));
  NIXL_ASSIGN(const FrameKind kind, kind_of(answer.bytes));
  if (kind != FrameKind::kWelcome) return fail(Code::kMismatch, "the answer to a hello was no welcome");
  NIXL_TRY(open_segment());
  {
    const std::lock_guard lock(mutex_);
    state_ = State::kReady;
  }
  changed_.notify_all();
  owner_.news.wake();
  return {};
}

Result<void> Line::open_segment() {
  {
    const std::lock_guard lock(mutex_);
    stale_ = false;
    reopening_ = true;
  }
  const auto segment = owner_.engine.open_segment(contact_.segment);
  const std::lock_guard lock(mutex_);
  reopening_ = false;
  if (!segment) return fail(segment.error());
  segment_ = *segment;
  return {};
}

Result<void> Line::serve() {
  for (;;) {
    pollfd entries[] = {{wakeup_.fd(), POLLIN, 0}, {channel_->fd(), POLLIN, 0}};
    NIXL_TRY(send_queued());
    NIXL_TRY(net::wait_any(entries, Deadline::never()));
    if (stopping_) return {};
    wakeup_.clear();
    if (entries[1].revents != 0) NIXL_TRY(read_answer());
    bool stale;
    {
      const std::lock_guard lock(mutex_);
      stale = stale_;
    }
    if (!stale) continue;
    NIXL_TRY(open_segment());
    owner_.news.wake();
  }
}

Result<void> Line::read_answer() {
  NIXL_ASSIGN(const auto message, channel_->try_receive());
  if (!message) return {};
  NIXL_ASSIGN(const FrameKind kind, kind_of(message->bytes));
  if (kind != FrameKind::kBye) return fail(Code::kMismatch, "a frame that an answering side does not send");
  const std::lock_guard lock(mutex_);
  left_ = true;
  return fail(Code::kPeerLost, "it has closed its backend");
}

Result<void> Line::send_queued() {
  for (;;) {
    std::string frame;
    {
      const std::lock_guard lock(mutex_);
      sending_ = !queue_.empty();
      if (!sending_) break;
      frame = std::move(queue_.front());
      queue_.pop_front();
    }
    NIXL_TRY(channel_->send(frame, Deadline::never()));
  }
  changed_.notify_all();
  return {};
}

}  // namespace nixl::core::mooncake
