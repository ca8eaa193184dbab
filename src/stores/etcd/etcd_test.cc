// The store against a real etcd on free ports, stopped and started by pid.
#include "stores/etcd/etcd.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "base/fd.h"
#include "base/log.h"
#include "check.h"
#include "fuzz.h"
#include "http/client.h"
#include "http/json.h"
#include "http/text.h"
#include "net/local.h"
#include "net/stream.h"
#include "net/tcp.h"
#include "net/wait.h"

using namespace nixl::core;

namespace {

constexpr Nanoseconds kMs = 1'000'000;
constexpr char kPublisher[] = "NIXL_TEST_ETCD_PUBLISHER";  // set: be the process that publishes there

int free_port() {
  Fd fd(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  CHECK(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
  CHECK(::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
  return ntohs(address.sin_port);
}

class Server {
 public:
  Server()
      : client_("http://127.0.0.1:" + std::to_string(free_port())),
        peer_("http://127.0.0.1:" + std::to_string(free_port())) {
    char text[] = "/tmp/nixl_etcd_XXXXXX";
    CHECK(::mkdtemp(text) != nullptr);
    folder_ = text;
    start();
  }
  ~Server() {
    stop(SIGKILL);
    (void)!std::system(("rm -rf " + folder_).c_str());
  }
  void start() {
    pid_ = ::fork();
    if (pid_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // a failed check must not leave a server behind
      const int quiet = ::open("/dev/null", O_WRONLY);
      ::dup2(quiet, 1);
      ::dup2(quiet, 2);
      const std::string cluster = "default=" + peer_;
      ::execlp("etcd", "etcd", "--data-dir", folder_.c_str(), "--listen-client-urls", client_.c_str(),
               "--advertise-client-urls", client_.c_str(), "--listen-peer-urls", peer_.c_str(),
               "--initial-advertise-peer-urls", peer_.c_str(), "--initial-cluster", cluster.c_str(),
               "--unsafe-no-fsync", nullptr);
      ::_exit(127);
    }
    // Ready when it answers a read.
    for (const Deadline limit = Deadline::after(30'000 * kMs);;) {
      int status;
      if (::waitpid(pid_, &status, WNOHANG) == pid_) {
        pid_ = 0;
        if (WIFEXITED(status) && WEXITSTATUS(status) == 127) SKIP("no etcd program (Debian package etcd-server)");
        check::failed(__FILE__, __LINE__, "etcd ended by itself");
      }
      const auto answer = open()->fetch("ready?", Deadline::passed_already());
      if (answer || answer.error().code == Code::kTimeout) return;
      CHECK(!limit.passed());
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
  }
  void stop(int signal) {
    if (pid_ <= 0) return;
    ::kill(pid_, signal);
    ::waitpid(pid_, nullptr, 0);
    pid_ = 0;
  }
  std::unique_ptr<Store> open(Nanoseconds lease = 0) {
    StoreConfig config;
    config.endpoint = client_;
    config.timeout_ns = 2'000 * kMs;
    config.lease_ns = lease;
    return std::move(*CHECK_OK(store_etcd().open(config)));
  }
  const std::string& url() const { return client_; }

 private:
  std::string client_, peer_, folder_;
  pid_t pid_ = 0;
};
Server& server() {
  static Server one;
  return one;
}

// What a watch told, in order.
struct Told {
  std::function<void(const StoreEvent&)> callback() {
    return [this](const StoreEvent& event) {
      const std::lock_guard lock(mutex);
      text += (event.kind == StoreEvent::Kind::kPut ? "+" : "-") + event.key + "=" + event.value + " ";
      changed.notify_all();
    };
  }
  void wait_for(const std::string& expected, int seconds = 20) {
    std::unique_lock lock(mutex);
    if (!changed.wait_for(lock, std::chrono::seconds(seconds), [&] { return text == expected; }))
      check::failed(__FILE__, __LINE__, "told \"" + text + "\", expected \"" + expected + "\"");
  }
  std::mutex mutex;
  std::condition_variable changed;
  std::string text;
};

}  // namespace

TEST(any_bytes_put_get_withdraw) {
  auto store = server().open();
  const std::string key("k\0\xff/\"", 5), value("\0\1\2\xfe\xff", 5);
  CHECK_OK(store->publish(key, value));
  CHECK(*CHECK_OK(store->fetch(key, Deadline::passed_already())) == value);
  CHECK_OK(store->publish(key, ""));
  CHECK(CHECK_OK(store->fetch(key, Deadline::passed_already()))->empty());
  CHECK_OK(store->withdraw(key));
  CHECK_OK(store->withdraw(key));
  const auto gone = store->fetch(key, Deadline::after(30 * kMs));
  CHECK(!gone && gone.error().code == Code::kTimeout);
  const std::string big(1 << 20, 'b');
  CHECK_OK(store->publish("big", big));
  CHECK(*CHECK_OK(store->fetch("big", Deadline::passed_already())) == big);
}

TEST(fetch_waits_for_a_key_to_come) {
  auto store = server().open(), other = server().open();
  std::thread late([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(150));
    CHECK_OK(other->publish("late", "here"));
  });
  CHECK_EQ(*CHECK_OK(store->fetch("late", Deadline::after(10'000 * kMs))), "here");
  late.join();
}

TEST(watch_tells_changes_under_a_prefix_only) {
  auto store = server().open();
  CHECK_OK(store->publish("w/old", "0"));
  Told told;
  auto watch = std::move(*CHECK_OK(store->watcher()->watch("w/", told.callback())));
  CHECK_OK(store->publish("v", "no"));
  CHECK_OK(store->publish("w/a", "1"));
  CHECK_OK(store->publish("w0", "no"));
  CHECK_OK(store->publish("w/a", "2"));
  CHECK_OK(store->withdraw("w/old"));
  told.wait_for("+w/a=1 +w/a=2 -w/old= ");
  watch.reset();
  CHECK_OK(store->publish("w/a", "3"));
  CHECK_EQ(told.text, "+w/a=1 +w/a=2 -w/old= ");
}

TEST(leased_keys_vanish_after_their_publisher) {
  auto watcher = server().open();
  Told told;
  auto watch = std::move(*CHECK_OK(watcher->watcher()->watch("lease/", told.callback())));
  const pid_t child = ::fork();
  if (child == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::setenv(kPublisher, server().url().c_str(), 1);
    ::execl("/proc/self/exe", "etcd_test", nullptr);
    ::_exit(127);
  }
  told.wait_for("+lease/a=1 ");
  std::this_thread::sleep_for(std::chrono::milliseconds(2500));  // longer than the lease: it is being renewed
  CHECK_EQ(told.text, "+lease/a=1 ");
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  told.wait_for("+lease/a=1 -lease/a= ");
}

TEST(watch_and_lease_survive_a_restart_of_the_server) {
  auto store = server().open(1'000 * kMs);
  auto plain = server().open();
  CHECK_OK(store->publish("r/mine", "1"));
  CHECK_OK(plain->publish("r/old", "1"));
  Told told;
  auto watch = std::move(*CHECK_OK(plain->watcher()->watch("r/", told.callback())));
  server().stop(SIGKILL);
  const auto down = plain->fetch("r/old", Deadline::after(300 * kMs));
  CHECK(!down && down.error().code == Code::kIo && down.error().reason.find(server().url()) != std::string::npos);
  server().start();
  CHECK_OK(plain->publish("r/new", "2"));
  told.wait_for("+r/new=2 ");
  CHECK_EQ(*CHECK_OK(plain->fetch("r/mine", Deadline::after(10'000 * kMs))), "1");
}

// As when this process, or the server, has been stopped for longer than the lease.
TEST(a_lease_that_ran_out_is_replaced_by_whoever_publishes_next) {
  auto store = server().open(60'000 * kMs);  // no renewal comes to its help
  CHECK_OK(store->publish("lost/a", "1"));
  const auto client = std::move(*CHECK_OK(http::Client::open({})));
  const auto ask = [&](const char* path, std::string body) {
    http::Call call;
    call.method = "POST";
    call.url = server().url() + path;
    call.text_body = std::move(body);
    call.deadline = Deadline::after(5'000 * kMs);
    const http::Outcome outcome = client->perform(std::move(call));
    CHECK(!outcome.failed && outcome.reply.ok());
    return *CHECK_OK(http::Json::parse(outcome.reply.text));
  };
  const auto kept = ask("/v3/kv/range", "{\"key\":\"" + http::base64_encode("lost/a") + "\"}");
  const std::string lease = kept["kvs"].items().at(0)["lease"].text();
  ask("/v3/lease/revoke", "{\"ID\":\"" + lease + "\"}");
  const auto gone = store->fetch("lost/a", Deadline::passed_already());
  CHECK(!gone && gone.error().code == Code::kTimeout);
  CHECK_OK(store->publish("lost/b", "2"));
  CHECK_EQ(*CHECK_OK(store->fetch("lost/b", Deadline::passed_already())), "2");
}

TEST(what_was_published_to_a_dead_server_is_there_when_it_is_back) {
  auto store = server().open(1'000 * kMs), other = server().open();
  server().stop(SIGKILL);
  const auto refused = store->publish("debt/a", "1");
  CHECK(!refused && refused.error().code == Code::kIo);
  CHECK(!store->publish("debt/b", "2"));
  (void)store->withdraw("debt/b");
  server().start();
  CHECK_EQ(*CHECK_OK(other->fetch("debt/a", Deadline::after(20'000 * kMs))), "1");
  CHECK(!other->fetch("debt/b", Deadline::passed_already()));
}

// A server that answers damaged JSON: results in time, a watch that says nothing wild, and an end.
TEST(damaged_answers_do_no_harm) {
  set_log_level(LogLevel::kFatal);
  Fd listener = std::move(*CHECK_OK(net::listen_tcp({"127.0.0.1", 0})));
  const std::uint16_t port = CHECK_OK(net::local_endpoint(listener.get()))->port;
  std::atomic<bool> stop{false};
  const std::string kv = "{\"key\":\"" + http::base64_encode("k") + "\",\"value\":\"" + http::base64_encode("v") +
                         "\",\"mod_revision\":\"7\"}";
  const std::string good = "{\"header\":{\"revision\":\"9\"},\"ID\":\"77\",\"kvs\":[" + kv +
                           "],\"result\":{\"TTL\":\"5\",\"events\":[{\"type\":\"DELETE\",\"kv\":" + kv +
                           "},{\"kv\":" + kv + "}]}}\n";
  const auto talk = [&](const Fd& guest, check::Fuzz& fuzz) {
    std::string input;
    while (!stop && net::wait_for(guest.get(), POLLIN, Deadline::after(100 * kMs), "a request") &&
           net::receive_available(guest.get(), input)) {
      const std::string body = fuzz.one_in(4) ? good : fuzz.changed(good);
      const std::string head = "HTTP/1.1 200 OK\r\nContent-Length: " + std::to_string(body.size()) + "\r\n\r\n";
      if (!net::send_all(guest.get(), (fuzz.one_in(20) ? fuzz.changed(head) : head) + body, Deadline::after(100 * kMs)))
        return;
    }
  };
  std::vector<std::thread> servers;
  for (int i = 0; i < 4; ++i)
    servers.emplace_back([&, i] {
      check::Fuzz fuzz;
      fuzz.random.discard(static_cast<unsigned long long>(i) * 1000);
      while (!stop)
        if (auto guest = net::accept_connection(listener.get()))
          talk(*guest, fuzz);
        else
          (void)net::wait_for(listener.get(), POLLIN, Deadline::after(20 * kMs), "a caller");
    });
  StoreConfig config;
  config.endpoint = "http://127.0.0.1:" + std::to_string(port);
  config.timeout_ns = 200 * kMs;
  config.lease_ns = 1'000 * kMs;
  auto store = std::move(*CHECK_OK(store_etcd().open(std::move(config))));
  for (const Deadline end = Deadline::after(3'000 * kMs); !end.passed();) {
    const Nanoseconds start = now_ns();
    auto watch = store->watcher()->watch("k", [](const StoreEvent& event) { CHECK(event.key.size() < 1000); });
    (void)store->publish("k", "v");
    (void)store->fetch("k", Deadline::after(20 * kMs));
    (void)store->withdraw_prefix("k");
    CHECK(now_ns() - start < 10'000 * kMs);
  }
  stop = true;
  store.reset();
  for (std::thread& thread : servers) thread.join();
  set_log_level(LogLevel::kWarn);
}

TEST(endpoints) {
  StoreConfig config;
  for (const char* bad : {"", " , ", "ftp://x"}) {
    config.endpoint = bad;
    CHECK(!store_etcd().open(config));
  }
  // The first endpoint is dead: the second is used.
  config.endpoint = "127.0.0.1:1," + server().url().substr(7);
  auto store = std::move(*CHECK_OK(store_etcd().open(config)));
  CHECK_OK(store->publish("second", "yes"));
  config.endpoint = "http://127.0.0.1:1";
  auto nobody = std::move(*CHECK_OK(store_etcd().open(config)));
  const auto refused = nobody->publish("x", "y");
  CHECK(!refused && refused.error().code == Code::kIo &&
        refused.error().reason.find("http://127.0.0.1:1") != std::string::npos);
}

TEST(an_endpoint_that_hangs_costs_its_share_of_the_time_once) {
  Fd silent = std::move(*CHECK_OK(net::listen_tcp({"127.0.0.1", 0})));  // the kernel takes callers, nobody answers
  const std::uint16_t port = CHECK_OK(net::local_endpoint(silent.get()))->port;
  StoreConfig config;
  config.endpoint = "http://127.0.0.1:" + std::to_string(port) + "," + server().url();
  config.timeout_ns = 2'000 * kMs;
  auto store = std::move(*CHECK_OK(store_etcd().open(config)));
  CHECK_OK(store->publish("beside/hanging", "yes"));
  const Nanoseconds start = now_ns();
  CHECK_EQ(*CHECK_OK(store->fetch("beside/hanging", Deadline::after(1'000 * kMs))), "yes");
  CHECK(now_ns() - start < 900 * kMs);  // the one that answered goes first
}

// A process of its own that publishes a leased key and is killed without a word.
static int publish_and_wait(const char* url) {
  StoreConfig config;
  config.endpoint = url;
  config.lease_ns = 1'000 * kMs;
  auto store = std::move(*CHECK_OK(store_etcd().open(config)));
  CHECK_OK(store->publish("lease/a", "1"));
  ::pause();
  return 0;
}

int main(int argc, char** argv) {
  if (const char* url = ::getenv(kPublisher)) return publish_and_wait(url);
  return check::run_tests(argc, argv);
}
