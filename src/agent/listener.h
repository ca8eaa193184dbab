// The server side of the socket exchange: one thread, any number of connections, none of which can hold up another.
#pragma once
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "agent/exchange.h"
#include "agent/frames.h"
#include "agent/seal.h"
#include "net/wait.h"

namespace nixl::core {

class Listener {
 public:
  // Listens on all interfaces, IPv4 and IPv6. kIo naming the port when it is taken. With a secret, only callers who know it are heard.
  static Result<std::unique_ptr<Listener>> open(std::uint16_t port, std::string secret, const Exchange::Hooks& hooks);
  ~Listener();
  std::uint16_t port() const noexcept { return port_; }

 private:
  struct Guest {
    Fd socket;
    FrameReader input;
    std::optional<Seal> seal;
    std::string output;
    std::size_t written = 0;
    Deadline patience = Deadline::never();  // for the rest of a begun frame or answer
    bool over = false;
  };
  Listener(Fd socket, std::uint16_t port, std::string secret, net::Wakeup wakeup, const Exchange::Hooks& hooks)
      : socket_(std::move(socket)),
        port_(port),
        secret_(std::move(secret)),
        wakeup_(std::move(wakeup)),
        hooks_(hooks) {}
  void loop();
  void accept_all();
  void read(Guest& guest);
  void take_frames(Guest& guest);
  void write(Guest& guest);
  Result<void> take(Guest& guest, Frame frame);
  void answer(Guest& guest, Frame frame);
  void reply(Guest& guest, std::string frame);

  Fd socket_;
  const std::uint16_t port_;
  const std::string secret_;
  net::Wakeup wakeup_;
  const Exchange::Hooks& hooks_;
  std::vector<std::unique_ptr<Guest>> guests_;
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

}  // namespace nixl::core
