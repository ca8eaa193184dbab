// A store over TCP: one small server holds the keys, any number of clients use it. The server knows no identities, so a
// client that was killed and comes back is served at once.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "contract/entry.h"
#include "net/channel.h"
#include "net/tcp.h"
#include "net/wait.h"
#include "stores/tcp/protocol.h"

namespace nixl::core {

// Serves until it is destroyed. Keys live in memory and go with it.
class TcpStoreServer {
 public:
  // Port 0 takes a free one.
  static Result<std::unique_ptr<TcpStoreServer>> open(const net::Endpoint& endpoint);
  ~TcpStoreServer();
  std::uint16_t port() const noexcept { return port_; }

 private:
  struct Client {
    net::Channel channel;
    std::string awaited;  // key of a fetch that waits; empty: none
    Deadline until = Deadline::never();
    bool gone = false;
  };

  TcpStoreServer(Fd listener, net::Wakeup stop, std::uint16_t port);
  void serve();
  void accept_all();
  void hear(Client& client);
  void obey(Client& client, tcp_store::Request request);
  void publish(std::string key, std::string value);
  void give_up_waiting();
  void answer(Client& client, const tcp_store::Answer& answer);

  Fd listener_;
  net::Wakeup stop_;
  const std::uint16_t port_;
  std::atomic<bool> stopping_{false};
  std::map<std::string, std::string> values_;  // of the thread alone, as is what follows
  std::vector<std::unique_ptr<Client>> clients_;
  std::thread thread_;
};

// A client; any threads. A call takes an idle connection or makes one, and one that was lost meanwhile is replaced
// once.
class TcpStore final : public Store {
 public:
  static Result<std::unique_ptr<Store>> open(StoreConfig config);
  Result<void> publish(std::string_view key, std::string_view value) override;
  Result<std::string> fetch(std::string_view key, Deadline deadline) override;
  Result<void> withdraw(std::string_view key) override;

 private:
  TcpStore(StoreConfig config, net::Endpoint endpoint) : config_(std::move(config)), endpoint_(std::move(endpoint)) {}
  Result<tcp_store::Answer> ask(const tcp_store::Request& request, Deadline deadline);
  Result<tcp_store::Answer> converse(net::Channel& channel, const std::string& request, Deadline deadline);
  Result<net::Channel> dial(Deadline deadline);
  std::unique_ptr<net::Channel> take_idle();

  const StoreConfig config_;
  const net::Endpoint endpoint_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<net::Channel>> idle_;
};

const StoreEntry& store_tcp();

}  // namespace nixl::core
