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

#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>

#include "base/fd.h"
#include "check.h"

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
