#include "stores/tcp/tcp.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <thread>

#include "check.h"
#include "fuzz.h"
#include "net/local.h"
#include "net/stream.h"

using namespace nixl::core;

namespace {

constexpr Nanoseconds kMs = 1'000'000;

std::unique_ptr<Store> client_of(std::uint16_t port) {
  return std::move(*CHECK_OK(store_tcp().open({"127.0.0.1:" + std::to_string(port)})));
}

}  // namespace

TEST(keys_come_and_go) {
  auto server = std::move(*CHECK_OK(TcpStoreServer::open({"127.0.0.1", 0})));
  auto a = client_of(server->port()), b = client_of(server->port());
  const std::string odd("k\0\xff", 3), large(5 << 20, 'v');
  CHECK_OK(a->publish(odd, large));
  CHECK(*CHECK_OK(b->fetch(odd, Deadline::passed_already())) == large);
  CHECK_OK(b->publish(odd, ""));
  CHECK_EQ(*CHECK_OK(a->fetch(odd, Deadline::passed_already())), "");
  CHECK_OK(a->withdraw(odd));
  CHECK_OK(a->withdraw(odd));
  auto absent = b->fetch(odd, Deadline::passed_already());
  CHECK(!absent && absent.error().code == Code::kTimeout);
  auto long_key = a->publish(std::string(5000, 'k'), "");
  CHECK(!long_key && long_key.error().code == Code::kInvalidArgument);
}

TEST(fetch_waits_until_published_or_the_deadline) {
  auto server = std::move(*CHECK_OK(TcpStoreServer::open({"127.0.0.1", 0})));
  auto store = client_of(server->port());
  const Nanoseconds start = now_ns();
  auto absent = store->fetch("k", Deadline::after(50 * kMs));
  CHECK(!absent && absent.error().code == Code::kTimeout);
  CHECK(now_ns() - start >= 50 * kMs);
  std::vector<std::thread> waiting;  // several threads on one client
  for (int i = 0; i < 8; ++i)
    waiting.emplace_back([&] { CHECK_EQ(*CHECK_OK(store->fetch("k", Deadline::after(20'000 * kMs))), "v"); });
  CHECK_OK(store->publish("other", ""));
  CHECK_OK(store->publish("k", "v"));
  for (auto& thread : waiting) thread.join();
}

TEST(a_killed_client_disturbs_nobody_and_comes_back) {
  auto server = std::move(*CHECK_OK(TcpStoreServer::open({"127.0.0.1", 0})));
  auto store = client_of(server->port());
  for (int round = 0; round < 3; ++round) {
    int ready[2];
    CHECK_EQ(::pipe(ready), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      auto mine = store_tcp().open({"127.0.0.1:" + std::to_string(server->port())});
      const bool good = mine && (*mine)->publish("child", std::to_string(round));
      (void)!::write(ready[1], good ? "y" : "n", 1);
      (void)(*mine)->fetch("never", Deadline::after(60'000 * kMs));
      ::_exit(0);
    }
    char answer = 0;
    CHECK_EQ(::read(ready[0], &answer, 1), 1);
    CHECK_EQ(answer, 'y');
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    CHECK_EQ(*CHECK_OK(store->fetch("child", Deadline::after(10'000 * kMs))), std::to_string(round));
    ::close(ready[0]);
    ::close(ready[1]);
  }
}

TEST(a_new_server_is_found_and_an_absent_one_is_named) {
  auto server = std::move(*CHECK_OK(TcpStoreServer::open({"127.0.0.1", 0})));
  const std::uint16_t port = server->port();
  auto store = client_of(port);
  CHECK_OK(store->publish("k", "old"));
  server.reset();
  auto lost = store->publish("k", "v");
  CHECK(!lost && lost.error().code == Code::kIo);
  CHECK(lost.error().reason.find("127.0.0.1:" + std::to_string(port)) != std::string::npos);
  CHECK(!store->fetch("k", Deadline::after(100 * kMs)));
  server = std::move(*CHECK_OK(TcpStoreServer::open({"127.0.0.1", port})));
  CHECK_OK(store->publish("k", "new"));
  CHECK_EQ(*CHECK_OK(store->fetch("k", Deadline::passed_already())), "new");
  CHECK(!store_tcp().open({"nonsense"}));
}

TEST(garbage_ends_one_connection_only) {
  auto server = std::move(*CHECK_OK(TcpStoreServer::open({"127.0.0.1", 0})));
  auto store = client_of(server->port());
  const Deadline deadline = Deadline::after(10'000 * kMs);
  for (const std::string& text : {std::string("GET / HTTP/1.1\r\n\r\n"), std::string(8, '\xff')}) {
    Fd raw = std::move(*CHECK_OK(net::connect_tcp({"127.0.0.1", server->port()}, deadline)));
    CHECK_EQ(::write(raw.get(), text.data(), text.size()), ssize_t(text.size()));
    CHECK_OK(net::wait_for(raw.get(), POLLIN, deadline, "the end of the connection"));
  }
  Fd unasked = std::move(*CHECK_OK(net::connect_tcp({"127.0.0.1", server->port()}, deadline)));
  CHECK_OK(net::send_all(unasked.get(), encode(tcp_store::Request{tcp_store::Verb::kGet, {"k"}}), deadline));
  std::string nothing;
  auto refused = net::receive_until(unasked.get(), nothing, 1, deadline);  // it did not begin with VALIDATE
  CHECK(!refused && refused.error().code == Code::kPeerLost);
  CHECK_OK(store->publish("k", "v"));
}

TEST(requests_arrive_in_any_pieces) {
  const tcp_store::Request set{tcp_store::Verb::kSet, {"key"}, "value"};
  const tcp_store::Request check{tcp_store::Verb::kCheck, {"a", "b"}};
  const std::string bytes = encode(set) + encode(check);
  for (std::size_t size = 0; size < encode(set).size(); ++size)
    CHECK(!CHECK_OK(tcp_store::parse_request(bytes.substr(0, size)))->has_value());
  const auto first = *CHECK_OK(tcp_store::parse_request(bytes));
  CHECK_EQ(first->request.keys.at(0), "key");
  CHECK_EQ(first->request.value, "value");
  const auto second = *CHECK_OK(tcp_store::parse_request(std::string_view(bytes).substr(first->used)));
  CHECK(second && second->request.keys.size() == 2);
  CHECK(!tcp_store::parse_request(std::string(1, char(77))));
}

TEST(damaged_requests_are_refused_or_read_and_no_more) {
  using tcp_store::Verb;
  const std::string all = encode(tcp_store::Request{Verb::kValidate, {}, "", tcp_store::kMagic}) +
                          encode(tcp_store::Request{Verb::kSet, {"key"}, "value"}) +
                          encode(tcp_store::Request{Verb::kCheck, {"a", "b"}}) +
                          encode(tcp_store::Request{Verb::kGet, {"key"}});
  check::fuzz(all, [](const std::string& bytes) {
    std::string_view left = bytes;
    for (;;) {
      const auto parsed = tcp_store::parse_request(left);
      if (!parsed || !*parsed) break;
      CHECK((*parsed)->used > 0 && (*parsed)->used <= left.size());
      left.remove_prefix((*parsed)->used);
    }
  });
}

// A server whose answers are damaged: what comes back is an error or some value, in time.
TEST(damaged_answers_end_in_time) {
  Fd listener = std::move(*CHECK_OK(net::listen_tcp({"127.0.0.1", 0})));
  const std::uint16_t port = CHECK_OK(net::local_endpoint(listener.get()))->port;
  std::atomic<bool> stop{false};
  std::thread server([&] {
    check::Fuzz fuzz;
    while (!stop) {
      auto guest = net::accept_connection(listener.get());
      if (!guest) {
        (void)net::wait_for(listener.get(), POLLIN, Deadline::after(20 * kMs), "a caller");
        continue;
      }
      std::string input;
      while (!stop && net::wait_for(guest->get(), POLLIN, Deadline::after(200 * kMs), "a request") &&
             net::receive_available(guest->get(), input)) {
        const std::string answer = fuzz.changed(std::string(1, '\0') + tcp_store::encode_text("value"));
        if (!net::send_all(guest->get(), answer, Deadline::after(200 * kMs)) || fuzz.one_in(3)) break;
      }
    }
  });
  StoreConfig config;
  config.endpoint = "127.0.0.1:" + std::to_string(port);
  config.timeout_ns = 50 * kMs;
  auto store = std::move(*CHECK_OK(TcpStore::open(std::move(config))));
  const Deadline end = Deadline::after(2'000 * kMs);
  while (!end.passed()) {
    const Nanoseconds start = now_ns();
    (void)store->fetch("key", Deadline::after(20 * kMs));
    (void)store->publish("key", "value");
    (void)store->withdraw("key");
    CHECK(now_ns() - start < 10'000 * kMs);
  }
  stop = true;
  store.reset();
  server.join();
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
