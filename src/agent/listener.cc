#include "agent/listener.h"

#include <sys/socket.h>

#include "base/log.h"
#include "net/local.h"
#include "net/tcp.h"

namespace nixl::core {
namespace {
constexpr std::size_t kMostGuests = 1024;
constexpr Nanoseconds kBodyTime = 5'000'000'000;
constexpr int kPiecesATurn = 4;  // of 64 KiB, then the other guests have their turn
constexpr Nanoseconds kPauseWithoutDescriptors = 10'000'000;
}  // namespace

Result<std::unique_ptr<Listener>> Listener::open(std::uint16_t port, std::string secret, const Exchange::Hooks& hooks) {
  auto socket = net::listen_tcp({"", port});
  if (!socket)
    return fail(Code::kIo, "agent '%s' cannot listen on port %u: %s", hooks.agent.c_str(), port,
                socket.error().reason.c_str());
  NIXL_ASSIGN(const net::Endpoint here, net::local_endpoint(socket->get()));
  NIXL_ASSIGN(net::Wakeup wakeup, net::Wakeup::open());
  std::unique_ptr<Listener> listener(
      new Listener(std::move(*socket), here.port, std::move(secret), std::move(wakeup), hooks));
  listener->thread_ = std::thread([self = listener.get()] { self->loop(); });
  return listener;
}

Listener::~Listener() {
  stopping_ = true;
  wakeup_.wake();
  if (thread_.joinable()) thread_.join();
}

void Listener::loop() {
  std::vector<pollfd> waits;
  while (!stopping_) {
    waits.clear();
    waits.push_back({wakeup_.fd(), POLLIN, 0});
    waits.push_back({socket_.get(), POLLIN, 0});
    Deadline deadline = Deadline::never();
    for (const auto& guest : guests_) {
      const short events = guest->written < guest->output.size() ? POLLOUT : POLLIN;
      waits.push_back({guest->socket.get(), events, 0});
      deadline = deadline.earlier(guest->patience);
    }
    if (const auto ready = net::wait_any(waits, deadline); !ready) {
      NIXL_ERROR("metadata listener on port %u stops: %s", port_, ready.error().reason.c_str());
      return;
    }
    for (std::size_t i = 2; i < waits.size(); ++i) {
      Guest& guest = *guests_[i - 2];
      if (waits[i].revents) {
        waits[i].events == POLLOUT ? write(guest) : read(guest);
        take_frames(guest);
      }
      if (guest.patience.passed()) guest.over = true;
    }
    std::erase_if(guests_, [](const auto& guest) { return guest->over; });
    if (waits[1].revents) accept_all();
  }
}

void Listener::accept_all() {
  for (;;) {
    auto socket = net::accept_connection(socket_.get());
    if (!socket) {  // no descriptors left: the callers stay in the queue
      if (socket.error().code != Code::kAgain) (void)net::wait_any({}, Deadline::after(kPauseWithoutDescriptors));
      return;
    }
    if (guests_.size() == kMostGuests)
      guests_.erase(guests_.begin());  // who has been here longest; an exchange is short
    auto guest = std::make_unique<Guest>();
    guest->socket = std::move(*socket);
    guests_.push_back(std::move(guest));
  }
}

void Listener::read(Guest& guest) {
  char buffer[64 << 10];
  for (int piece = 0; piece < kPiecesATurn; ++piece) {
    const ssize_t got = recv(guest.socket.get(), buffer, sizeof buffer, MSG_DONTWAIT);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (got <= 0) {
      guest.over = true;
      return;
    }
    if (guest.input.empty()) guest.patience = Deadline::after(kBodyTime);
    guest.input.append(buffer, static_cast<std::size_t>(got));
    if (static_cast<std::size_t>(got) < sizeof buffer) break;
  }
}

// An answer is sent before the next question is looked at: a guest that asks and does not read costs one answer's memory.
void Listener::take_frames(Guest& guest) {
  while (!guest.over && guest.output.empty()) {
    auto frame = guest.input.next();
    if (frame && !*frame) break;
    if (const auto taken = frame ? take(guest, std::move(**frame)) : Result<void>(fail(frame.error())); !taken) {
      NIXL_WARN("agent %s: metadata connection dropped: %s", hooks_.agent.c_str(), taken.error().reason.c_str());
      guest.over = true;
      return;
    }
  }
  if (!guest.output.empty()) return;  // write() grants the time for it
  if (guest.input.empty())
    guest.patience = Deadline::never();
  else if (guest.patience.at() == Deadline::never().at())
    guest.patience = Deadline::after(kBodyTime);
}

Result<void> Listener::take(Guest& guest, Frame frame) {
  if (secret_.empty()) {
    if (frame.verb == Verb::kHello || frame.verb == Verb::kSealed)
      return fail(Code::kNotAllowed, "the caller uses NIXL_LISTEN_SECRET, which is not set here");
    answer(guest, std::move(frame));
    return {};
  }
  if (!guest.seal) {
    if (frame.verb != Verb::kHello || frame.body.size() != Seal::kNonceBytes)
      return fail(Code::kNotAllowed, "the caller does not use NIXL_LISTEN_SECRET, which is set here");
    const std::string ours = Seal::nonce();
    guest.seal.emplace(secret_, Seal::Side::kListener, frame.body, ours);
    reply(guest, encode_frame(Verb::kHello, ours));
    return {};
  }
  NIXL_ASSIGN(Frame opened, guest.seal->open(frame));
  answer(guest, std::move(opened));
  return {};
}

void Listener::reply(Guest& guest, std::string frame) {
  guest.output += frame;
  guest.patience = Deadline::after(kBodyTime);
  write(guest);
}

void Listener::answer(Guest& guest, Frame frame) {
  switch (frame.verb) {
    case Verb::kLoad:
      if (auto name = hooks_.load(frame.body); !name)
        NIXL_WARN("agent %s: received metadata was not loaded: %s", hooks_.agent.c_str(), name.error().reason.c_str());
      break;
    case Verb::kSend:
      if (auto bytes = hooks_.metadata()) {
        const std::string frame_out = encode_frame(Verb::kLoad, *bytes);
        reply(guest, guest.seal ? guest.seal->close(frame_out) : frame_out);
      }
      break;
    case Verb::kInvalidate:
      hooks_.remove(frame.body);
      break;
    case Verb::kHello:
    case Verb::kSealed:
      break;  // no business inside a sealed frame
  }
}

void Listener::write(Guest& guest) {
  while (guest.written < guest.output.size()) {
    const ssize_t sent = send(guest.socket.get(), guest.output.data() + guest.written,
                              guest.output.size() - guest.written, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (sent <= 0) {
      guest.over = true;
      return;
    }
    guest.written += static_cast<std::size_t>(sent);
    guest.patience = Deadline::after(kBodyTime);
  }
  guest.output.clear();
  guest.written = 0;
  guest.patience = Deadline::never();
}

}  // namespace nixl::core
