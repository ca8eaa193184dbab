// A store over TCP in the wire of torch's TCPStore (protocol.h): our client works with torch's server and with ours.
// The server knows no identities, so a client that was killed and comes back is served at once.
#pragma once
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "contract/entry.h"
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
    Fd socket;
    std::string input;
    bool validated = false;
  };

  TcpStoreServer(Fd listener, net::Wakeup stop, std::uint16_t port);
  void serve();
  void accept_all();
  Result<void> hear(Client& client);
  Result<void> obey(Client& client, tcp_store::Request request);

  Fd listener_;
  net::Wakeup stop_;
  const std::uint16_t port_;
  std::atomic<bool> stopping_{false};
  std::map<std::string, std::string> values_;  // of the thread alone, as is what follows
  std::vector<Client> clients_;
  std::thread thread_;
};

// A client; any threads. A call takes an idle connection or makes one, and one that was lost meanwhile is replaced.
class TcpStore final : public Store {
 public:
  static Result<std::unique_ptr<Store>> open(StoreConfig config);
  Result<void> publish(std::string_view key, std::string_view value) override;
  Result<std::string> fetch(std::string_view key, Deadline deadline) override;
  Result<void> withdraw(std::string_view key) override;

 private:
  struct Connection {
    Fd socket;
    std::string input;
  };
  // What an answer looks like: a number of bytes, or a text.
  enum class Form { kNone, kByte, kLong, kText };

  TcpStore(StoreConfig config, net::Endpoint endpoint) : config_(std::move(config)), endpoint_(std::move(endpoint)) {}
  Result<std::string> ask(const tcp_store::Request& request, Form form);
  Result<std::string> converse(Connection& connection, const std::string& bytes, Form form, Deadline deadline);
  Result<Connection> dial(Deadline deadline);
  std::unique_ptr<Connection> take_idle();

  const StoreConfig config_;
  const net::Endpoint endpoint_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Connection>> idle_;
};

const StoreEntry& store_tcp();

}  // namespace nixl::core
