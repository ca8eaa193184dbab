#include "backends/mooncake/post_office.h"

#include <algorithm>
#include <chrono>

#include "backends/mooncake/sockets.h"
#include "net/local.h"
#include "net/tcp.h"

namespace nixl::core::mooncake {
namespace {

constexpr Nanoseconds kPatienceForHello = 10'000'000'000;
constexpr Nanoseconds kPauseWithoutDescriptors = 100'000'000;
constexpr int kRoundOfFrames = 64;  // of one caller, before the others have their turn

}  // namespace

Result<std::unique_ptr<PostOffice>> PostOffice::open(const std::string& address, std::uint64_t incarnation,
                                                     net::Wakeup& news) {
  NIXL_ASSIGN(Fd socket, net::listen_tcp({address, 0}));
  NIXL_ASSIGN(const net::Endpoint here, net::local_endpoint(socket.get()));
  NIXL_ASSIGN(net::Wakeup stop, net::Wakeup::open());
  std::unique_ptr<PostOffice> office(new PostOffice(std::move(socket), here.port, incarnation, std::move(stop), news));
  office->thread_ = std::thread([raw = office.get()] { raw->loop(); });
  return office;
}

PostOffice::~PostOffice() {
  stopping_ = true;
  stop_.wake();
  thread_.join();
  for (const auto& caller : callers_)
    if (!caller->name.empty())
      (void)caller->channel.send(frame_of(FrameKind::kBye), Deadline::passed_already());  // best effort: it may be full
}

void PostOffice::drain(std::vector<Notification>& out) {
  const std::lock_guard lock(mutex_);
  std::move(inbox_.begin(), inbox_.end(), std::back_inserter(out));
  inbox_.clear();
}

bool PostOffice::empty() const {
  const std::lock_guard lock(mutex_);
  return inbox_.empty();
}

void PostOffice::loop() {
  std::vector<pollfd> entries;
  while (!stopping_) {
    const bool open = no_callers_before_.passed();
    entries.assign({{stop_.fd(), POLLIN, 0}, {socket_.get(), static_cast<short>(open ? POLLIN : 0), 0}});
    Deadline next = open ? Deadline::never() : no_callers_before_;
    for (const auto& caller : callers_) {
      entries.push_back({caller->channel.fd(), POLLIN, 0});
      if (caller->name.empty()) next = next.earlier(caller->patience);
      if (caller->more) next = Deadline::passed_already();
    }
    if (!net::wait_any(entries, next)) return;
    for (std::size_t i = 0; i < callers_.size(); ++i) {
      const bool tired = callers_[i]->name.empty() && callers_[i]->patience.passed();
      const bool ready = callers_[i]->more || entries[i + 2].revents != 0;
      if (tired || (ready && !receive(*callers_[i]))) dismiss(callers_[i]);
    }
    std::erase(callers_, nullptr);
    if (entries[1].revents != 0) accept_all();
  }
}

void PostOffice::accept_all() {
  for (;;) {
    auto socket = net::accept_connection(socket_.get());
    if (!socket) {
      if (socket.error().code != Code::kAgain) no_callers_before_ = Deadline::after(kPauseWithoutDescriptors);
      return;
    }
    watch_over(socket->get());
    callers_.push_back(std::make_unique<Caller>(
        Caller{net::Channel(std::move(*socket), kMaxFrame), "", 0, Deadline::after(kPatienceForHello)}));
  }
}

void PostOffice::dismiss(std::unique_ptr<Caller>& caller) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto held = connected_.find(caller->incarnation); held != connected_.end()) connected_.erase(held);
  }
  ended_.notify_all();
  caller.reset();
}

void PostOffice::wait_for_end(std::uint64_t incarnation, Deadline deadline) {
  std::unique_lock lock(mutex_);
  ended_.wait_for(lock, std::chrono::nanoseconds(deadline.left()), [&] { return !connected_.count(incarnation); });
}

bool PostOffice::receive(Caller& caller) {
  bool any = false, alive = true;
  caller.more = true;
  for (int i = 0; i < kRoundOfFrames; ++i) {
    auto message = caller.channel.try_receive();
    if (!message || !*message) {
      alive = message.has_value();
      caller.more = false;
      break;
    }
    const std::string& frame = (*message)->bytes;
    if (caller.name.empty()) {
      if (!greet(caller, frame)) return false;
      continue;
    }
    const auto kind = kind_of(frame);
    if (!kind || *kind != FrameKind::kMessage) {
      alive = false;
      break;
    }
    const std::lock_guard lock(mutex_);
    inbox_.push_back({caller.name, std::string(body_of(frame))});
    any = true;
  }
  if (any) news_.wake();
  return alive;
}

bool PostOffice::greet(Caller& caller, std::string_view frame) {
  const auto hello = Hello::decode(frame);
  if (!hello || hello->wanted_incarnation != incarnation_ || hello->caller.name.empty()) return false;
  caller.name = hello->caller.name;
  caller.incarnation = hello->caller.incarnation;
  {
    const std::lock_guard lock(mutex_);
    connected_.insert(caller.incarnation);
  }
  return caller.channel.send(frame_of(FrameKind::kWelcome), Deadline::after(1'000'000'000)).has_value();
}

}  // namespace nixl::core::mooncake
