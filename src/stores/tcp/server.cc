#include <signal.h>

#include <algorithm>

#include "base/log.h"
#include "net/local.h"
#include "stores/tcp/tcp.h"

namespace nixl::core {
namespace {
constexpr Nanoseconds kAnswerLimit_ns = 1'000'000'000;  // a client that does not read is dropped
}

Result<std::unique_ptr<TcpStoreServer>> TcpStoreServer::open(const net::Endpoint& endpoint) {
  NIXL_ASSIGN(Fd listener, net::listen_tcp(endpoint));
  NIXL_ASSIGN(const net::Endpoint here, net::local_endpoint(listener.get()));
  NIXL_ASSIGN(net::Wakeup stop, net::Wakeup::open());
  std::unique_ptr<TcpStoreServer> server(new TcpStoreServer(std::move(listener), std::move(stop), here.port));
  sigset_t all, before;  // signals of the application are not for this thread
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  server->thread_ = std::thread(&TcpStoreServer::serve, server.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return server;
}

TcpStoreServer::TcpStoreServer(Fd listener, net::Wakeup stop, std::uint16_t port)
    : listener_(std::move(listener)), stop_(std::move(stop)), port_(port) {}

TcpStoreServer::~TcpStoreServer() {
  stopping_ = true;
  stop_.wake();
  if (thread_.joinable()) thread_.join();
}

void TcpStoreServer::serve() {
  while (!stopping_) {
    std::vector<pollfd> list{{listener_.get(), POLLIN, 0}, {stop_.fd(), POLLIN, 0}};
    Deadline until = Deadline::never();
    for (const auto& client : clients_) {
      list.push_back({client->channel.fd(), POLLIN, 0});
      if (!client->awaited.empty()) until = until.earlier(client->until);
    }
    if (auto ready = net::wait_any(list, until); !ready) {
      NIXL_ERROR("TCP store on port %u ends: %s", port_, ready.error().reason.c_str());
      return;
    }
    for (std::size_t i = 0; i < clients_.size(); ++i)
      if (list[i + 2].revents) hear(*clients_[i]);
    give_up_waiting();
    std::erase_if(clients_, [](const auto& client) { return client->gone; });
    accept_all();
  }
}

void TcpStoreServer::accept_all() {
  for (;;) {
    auto socket = net::accept_connection(listener_.get());
    if (!socket) {
      if (socket.error().code != Code::kAgain) {
        NIXL_WARN("TCP store on port %u cannot take a client: %s", port_, socket.error().reason.c_str());
        (void)net::wait_any({}, Deadline::after(10'000'000));
      }
      return;
    }
    clients_.push_back(std::make_unique<Client>(Client{net::Channel(std::move(*socket), tcp_store::kMaxFrameBytes)}));
  }
}

void TcpStoreServer::hear(Client& client) {
  while (!client.gone) {
    auto message = client.channel.try_receive();
    if (message && !*message) return;
    auto request = message ? tcp_store::parse_request((*message)->bytes) : fail(std::move(message).error());
    if (request)
      obey(client, std::move(*request));
    else
      client.gone = true;
  }
}

void TcpStoreServer::obey(Client& client, tcp_store::Request request) {
  if (request.verb == tcp_store::Verb::kPublish) {
    publish(std::move(request.key), std::move(request.value));
    answer(client, {true, ""});
  } else if (request.verb == tcp_store::Verb::kWithdraw) {
    values_.erase(request.key);
    answer(client, {true, ""});
  } else if (const auto found = values_.find(request.key); found != values_.end()) {
    answer(client, {true, found->second});
  } else if (request.wait_ns <= 0) {
    answer(client, {false, ""});
  } else {
    client.awaited = std::move(request.key);
    client.until = Deadline::after(request.wait_ns);
  }
}

void TcpStoreServer::publish(std::string key, std::string value) {
  const auto entry = values_.insert_or_assign(std::move(key), std::move(value)).first;
  for (const auto& client : clients_) {
    if (client->awaited != entry->first || client->gone) continue;
    client->awaited.clear();
    answer(*client, {true, entry->second});
  }
}

void TcpStoreServer::give_up_waiting() {
  for (const auto& client : clients_) {
    if (client->awaited.empty() || client->gone || !client->until.passed()) continue;
    client->awaited.clear();
    answer(*client, {false, ""});
  }
}

void TcpStoreServer::answer(Client& client, const tcp_store::Answer& answer) {
  if (!client.channel.send(tcp_store::encode(answer), Deadline::after(kAnswerLimit_ns))) client.gone = true;
}

}  // namespace nixl::core
