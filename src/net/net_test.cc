#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <string>
#include <thread>

#include "check.h"
#include "net/channel.h"
#include "net/local.h"
#include "net/tcp.h"
#include "net/wait.h"

using namespace nixl::core;
using namespace nixl::core::net;

namespace {

constexpr std::size_t kMaxBytes = 1 << 20;
constexpr Nanoseconds kSecond = 1'000'000'000;

Deadline soon() {
  return Deadline::after(10 * kSecond);
}

std::string unique_name(const char* what) {
  static int count = 0;
  return std::string("nixl-net-test-") + std::to_string(::getpid()) + "-" + what + std::to_string(count++);
}

struct Pair {
  Channel a, b;
};

Pair local_pair(std::size_t max_bytes = kMaxBytes) {
  const std::string name = unique_name("pair");
  Fd listener = std::move(*CHECK_OK(listen_local(name)));
  Fd dialled = std::move(*CHECK_OK(connect_local(name, soon())));
  CHECK_OK(wait_for(listener.get(), POLLIN, soon(), "a caller"));
  Fd accepted = std::move(*CHECK_OK(accept_connection(listener.get())));
  return {Channel(std::move(dialled), max_bytes), Channel(std::move(accepted), max_bytes)};
}

std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

Fd memory_file(const char* text) {
  Fd fd(::memfd_create("net_test", MFD_CLOEXEC));
  CHECK(fd);
  CHECK_EQ(::write(fd.get(), text, strlen(text)), ssize_t(strlen(text)));
  return fd;
}

std::string content(const Fd& fd) {
  char text[64] = "";
  const ssize_t size = ::pread(fd.get(), text, sizeof(text), 0);
  return std::string(text, size > 0 ? size_t(size) : 0);
}

}  // namespace

TEST(messages_keep_their_borders_and_descriptors) {
  Pair pair = local_pair();
  Fd first = memory_file("first"), second = memory_file("second"), third = memory_file("third");
  const int two[] = {first.get(), second.get()}, one[] = {third.get()};
  CHECK_OK(pair.a.send("with two", two, soon()));
  CHECK_OK(pair.a.send("", soon()));
  CHECK_OK(pair.a.send("with one", one, soon()));
  Message message = std::move(*CHECK_OK(pair.b.receive(soon())));
  CHECK_EQ(message.bytes, "with two");
  CHECK_EQ(message.descriptors.size(), 2u);
  CHECK_EQ(content(message.descriptors[0]), "first");
  CHECK_EQ(content(message.descriptors[1]), "second");
  message = std::move(*CHECK_OK(pair.b.receive(soon())));
  CHECK_EQ(message.bytes, "");
  CHECK(message.descriptors.empty());
  message = std::move(*CHECK_OK(pair.b.receive(soon())));
  CHECK_EQ(message.bytes, "with one");
  CHECK_EQ(content(message.descriptors.at(0)), "third");
}

TEST(a_message_larger_than_the_socket_buffer_arrives_whole) {
  Pair pair = local_pair(16 << 20);
  std::string large(8 << 20, 'x');
  for (std::size_t i = 0; i < large.size(); i += 4096) large[i] = char('a' + i / 4096 % 26);
  std::thread sender([&] { CHECK_OK(pair.a.send(large, soon())); });
  Message message = std::move(*CHECK_OK(pair.b.receive(soon())));
  sender.join();
  CHECK(message.bytes == large);
}

TEST(waits_end_at_their_deadline) {
  Pair pair = local_pair();
  const Nanoseconds start = now_ns();
  auto nothing = pair.b.receive(Deadline::after(kSecond / 20));
  CHECK(!nothing);
  CHECK(nothing.error().code == Code::kTimeout);
  CHECK(now_ns() - start >= kSecond / 20);
  std::string large(8 << 20, 'x');
  auto stuck = pair.a.send(large, Deadline::after(kSecond / 20));  // nobody reads
  CHECK(!stuck && stuck.error().code == Code::kTimeout);
}

TEST(garbage_and_oversize_are_refused_before_allocation) {
  Pair pair = local_pair(100);
  CHECK_OK(pair.a.send(std::string(101, 'x'), soon()));
  auto big = pair.b.receive(soon());
  CHECK(!big && big.error().code == Code::kMismatch);
  Pair other = local_pair();
  CHECK_EQ(::write(other.a.fd(), "GET / HTTP/1.1\r\n", 16), 16);
  auto garbage = other.b.receive(soon());
  CHECK(!garbage && garbage.error().code == Code::kMismatch);
  // Descriptors are announced, none comes.
  Pair third = local_pair();
  const unsigned char lie[8] = {0, 0, 0, 0, 3, 0, 0x58, 0x4e};
  CHECK_EQ(::write(third.a.fd(), lie, 8), 8);
  auto missing = third.b.receive(soon());
  CHECK(!missing && missing.error().code == Code::kMismatch);
}

TEST(the_end_of_the_other_side_is_peer_lost) {
  Pair pair = local_pair();
  { Channel gone = std::move(pair.a); }
  auto read = pair.b.receive(soon());
  CHECK(!read && read.error().code == Code::kPeerLost);
  auto written = pair.b.send("x", soon());
  CHECK(!written && written.error().code == Code::kPeerLost);
}

TEST(no_name_and_no_descriptor_is_left_behind) {
  const std::string name = unique_name("left");
  const std::size_t before = open_descriptors();
  for (int i = 0; i < 100; ++i) {
    Fd listener = std::move(*CHECK_OK(listen_local(name)));
    Channel dialled(std::move(*CHECK_OK(connect_local(name, soon()))), kMaxBytes);
    Channel accepted(std::move(*CHECK_OK(accept_connection(listener.get()))), kMaxBytes);
    Fd file = memory_file("x");
    const int one[] = {file.get()};
    CHECK_OK(dialled.send("unread", one, soon()));
    CHECK_OK(dialled.send("read", one, soon()));
    CHECK_OK(accepted.receive(soon()));
  }
  CHECK_EQ(open_descriptors(), before);
  auto refused = connect_local(name, soon());
  CHECK(!refused && refused.error().code == Code::kPeerLost);
}

TEST(a_killed_listener_leaves_its_name_free) {
  const std::string name = unique_name("killed");
  int ready[2];
  CHECK_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    auto listener = listen_local(name);
    (void)!::write(ready[1], listener ? "y" : "n", 1);
    ::pause();
    ::_exit(0);
  }
  char answer = 0;
  CHECK_EQ(::read(ready[0], &answer, 1), 1);
  CHECK_EQ(answer, 'y');
  {
    Fd dialled = std::move(*CHECK_OK(connect_local(name, soon())));
    const Credentials who = *CHECK_OK(peer_credentials(dialled.get()));
    CHECK_EQ(who.pid, child);
    CHECK_EQ(who.uid, ::geteuid());
  }
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  CHECK(!connect_local(name, soon()));
  CHECK_OK(listen_local(name));
  ::close(ready[0]);
  ::close(ready[1]);
}

TEST(a_full_queue_times_out) {
  const std::string name = unique_name("full");
  Fd listener = std::move(*CHECK_OK(listen_local(name)));
  CHECK_EQ(::listen(listener.get(), 0), 0);
  std::vector<Fd> waiting;
  for (int i = 0; i < 8; ++i) {
    auto fd = connect_local(name, Deadline::after(kSecond / 20));
    if (!fd) {
      CHECK(fd.error().code == Code::kTimeout);
      return;
    }
    waiting.push_back(std::move(*fd));
  }
  check::failed(__FILE__, __LINE__, "a queue of 0 took 8 callers");
}

TEST(names_are_limited) {
  CHECK(!listen_local(""));
  CHECK(!listen_local(std::string(kMaxLocalName + 1, 'x')));
  CHECK_OK(listen_local(std::string(kMaxLocalName, char('0' + ::getpid() % 10))));
}

TEST(endpoints_parse) {
  CHECK_EQ(CHECK_OK(parse_endpoint("a.b:80"))->host, "a.b");
  CHECK_EQ(CHECK_OK(parse_endpoint("[::1]:0"))->host, "::1");
  CHECK_EQ(CHECK_OK(parse_endpoint(":9999"))->port, 9999);
  CHECK_EQ(to_text(*CHECK_OK(parse_endpoint("[::1]:7"))), "[::1]:7");
  for (const char* bad : {"", "host", "host:", "host:x", "host:65536", "host:-1", "::1:80", "host:80x"}) {
    auto result = parse_endpoint(bad);
    CHECK(!result && result.error().code == Code::kInvalidArgument);
  }
}

TEST(tcp_connects_over_both_families) {
  for (const char* host : {"127.0.0.1", "::1"}) {
    auto listener = listen_tcp({host, 0});
    if (!listener && std::string(host) == "::1") {
      std::fprintf(stderr, "no IPv6 here: %s\n", listener.error().reason.c_str());
      continue;
    }
    const Endpoint here = *CHECK_OK(local_endpoint(CHECK_OK(std::move(listener))->get()));
    CHECK(here.port != 0);
  }
  Fd listener = std::move(*CHECK_OK(listen_tcp({"", 0})));
  const Endpoint here = *CHECK_OK(local_endpoint(listener.get()));
  Channel dialled(std::move(*CHECK_OK(connect_tcp({"127.0.0.1", here.port}, soon()))), kMaxBytes);
  CHECK_OK(wait_for(listener.get(), POLLIN, soon(), "a caller"));
  Channel accepted(std::move(*CHECK_OK(accept_connection(listener.get()))), kMaxBytes);
  CHECK_OK(accepted.send("hello", soon()));
  CHECK_EQ(CHECK_OK(dialled.receive(soon()))->bytes, "hello");
}

TEST(tcp_says_why_it_cannot_connect) {
  Endpoint here;
  {
    Fd listener = std::move(*CHECK_OK(listen_tcp({"127.0.0.1", 0})));
    here = *CHECK_OK(local_endpoint(listener.get()));
  }
  auto refused = connect_tcp(here, soon());
  CHECK(!refused && refused.error().code == Code::kPeerLost);
  CHECK(refused.error().reason.find(to_text(here)) != std::string::npos);
  auto unknown = connect_tcp({"no-such-host.invalid", 1}, soon());
  CHECK(!unknown && unknown.error().code == Code::kNotFound);
}

TEST(this_place_is_stable) {
  const Place a = *CHECK_OK(this_place()), b = *CHECK_OK(this_place());
  CHECK_EQ(a.boot_id, b.boot_id);
  CHECK_EQ(a.boot_id.size(), 36u);
  CHECK_EQ(a.network_namespace, b.network_namespace);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
