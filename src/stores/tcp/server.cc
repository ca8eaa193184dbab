#include <signal.h>

#include <algorithm>

#include "base/bytes.h"
#include "base/log.h"
#include "net/local.h"
#include "net/stream.h"
#include "stores/tcp/tcp.h"

namespace nixl::core {
namespace {

constexpr Nanoseconds kAnswerLimit_ns = 1'000'000'000;  // a client that does not read is dropped

template <typename T>
std::string number_bytes(T value) {
  ByteWriter out;
  out.put(value);
  return out.take();
}

}  // namespace

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
    for (const Client& client : clients_) list.push_back({client.socket.get(), POLLIN, 0});
    if (auto ready = net::wait_any(list, Deadline::never()); !ready) {
      NIXL_ERROR("TCP store on port %u ends: %s", port_, ready.error().reason.c_str());
      return;
    }
    for (std::size_t i = 0; i < clients_.size(); ++i)
      if (list[i + 2].revents && !hear(clients_[i])) clients_[i].socket.reset();
    std::erase_if(clients_, [](const Client& client) { return !client.socket; });
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
    clients_.push_back({std::move(*socket), {}, false});
  }
}

Result<void> TcpStoreServer::hear(Client& client) {
  NIXL_TRY(net::receive_available(client.socket.get(), client.input));
  for (;;) {
    NIXL_ASSIGN(auto parsed, tcp_store::parse_request(client.input));
    if (!parsed) return {};
    client.input.erase(0, parsed->used);
    NIXL_TRY(obey(client, std::move(parsed->request)));
  }
}

Result<void> TcpStoreServer::obey(Client& client, tcp_store::Request request) {
  using tcp_store::Verb;
  if (request.verb == Verb::kValidate) client.validated = request.number == tcp_store::kMagic;
  if (!client.validated) return fail(Code::kMismatch, "the connection did not begin with VALIDATE");
  std::string answer;
  switch (request.verb) {
    case Verb::kValidate:
      return {};
    case Verb::kSet:
      values_.insert_or_assign(std::move(request.keys[0]), std::move(request.value));
      return {};
    case Verb::kGet: {
      const auto found = values_.find(request.keys[0]);
      answer = tcp_store::encode_text(found == values_.end() ? "" : found->second);
      break;
    }
    case Verb::kCheck: {
      const bool all = std::ranges::all_of(request.keys, [&](const auto& key) { return values_.contains(key); });
      answer = number_bytes(static_cast<std::uint8_t>(all ? 0 : 1));
      break;
    }
    case Verb::kDeleteKey:
      answer = number_bytes(static_cast<std::int64_t>(values_.erase(request.keys[0])));
      break;
    case Verb::kPing:
      answer = number_bytes(request.number);
      break;
  }
  return net::send_all(client.socket.get(), answer, Deadline::after(kAnswerLimit_ns));
}

}  // namespace nixl::core
