// For tests of a network backend, between processes and within one: the backend driven as an agent drives it, and a peer, which is
// this program started again with the argument "peer". Such a program sets `tested` and gives what follows "peer" to serve().
#pragma once
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "check.h"
#include "contract/entry.h"
#include "plans.h"

namespace nixl::core::test {

inline constexpr Nanoseconds kPatience = 20'000'000'000;
inline constexpr std::size_t kBytes = 64 << 20;
inline const BackendEntry* tested = nullptr;

struct Lost final : Events {
  void peer_lost(const PeerId&, Error) noexcept override { ++count; }
  std::atomic<int> count{0};
};

// A backend driven as an agent drives it: polling for a while after the last activity, then asleep on its descriptor.
struct Node {
  Node(const std::string& name, std::uint64_t incarnation, const Params& params) : id{name, incarnation} {
    BackendConfig config;
    config.self = id;
    config.params = tested->params;
    for (const auto& [key, value] : params) config.params[key] = value;
    config.events = &lost;
    backend = std::move(*CHECK_OK(tested->open(std::move(config))));
    thread = std::thread([this] { drive(); });
  }
  ~Node() {
    stop = true;
    thread.join();
  }
  void drive() {
    Nanoseconds active = now_ns();
    while (!stop) {
      if (backend->progress()) active = now_ns();
      if (now_ns() - active < 100'000) continue;
      if (!backend->arm()) continue;
      pollfd wait{backend->event_fd(), POLLIN, 0};
      poll(&wait, 1, 50);
      active = now_ns();
    }
  }
  std::unique_ptr<Connection> connect(Node& peer) {
    return std::move(*CHECK_OK(backend->connect(peer.id, *CHECK_OK(peer.backend->export_connection()))));
  }
  Lost lost;
  PeerId id;
  std::unique_ptr<Backend> backend;
  std::atomic<bool> stop{false};
  std::thread thread;
};

// Ends the TCP connections of this process both ways; their number.
inline int cut_connections() {
  int num_cut = 0;
  for (int fd = 3; fd < 1024; ++fd) {
    sockaddr_storage peer{};
    socklen_t size = sizeof peer;
    if (getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) != 0) continue;
    if (peer.ss_family == AF_INET || peer.ss_family == AF_INET6) num_cut += shutdown(fd, SHUT_RDWR) == 0;
  }
  return num_cut;
}

inline std::string to_hex(const std::string& bytes) {
  std::string text;
  for (const unsigned char byte : bytes) {
    char two[3];
    std::snprintf(two, sizeof two, "%02x", byte);
    text += two;
  }
  return text;
}
inline std::string from_hex(const std::string& text) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < text.size(); i += 2)
    bytes += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
  return bytes;
}

inline std::vector<char> pattern(std::size_t size, unsigned seed) {
  std::vector<char> bytes(size);
  std::mt19937_64 random(seed);
  for (std::size_t at = 0; at + 8 <= size; at += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + at, &word, 8);
  }
  return bytes;
}

// The peer's whole life, with an incarnation and parameters KEY=VALUE as arguments: exposes one buffer filled with pattern 1, does and answers what the initiator asks for over its pipes.
inline int serve(char** argv) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  Params params;
  for (char** word = argv + 1; *word; ++word) {
    const char* const equals = std::strchr(*word, '=');
    params[std::string(*word, static_cast<std::size_t>(equals - *word))] = equals + 1;
  }
  Node node("peer", std::stoull(argv[0]), params);
  std::vector<char> buffer = pattern(kBytes, 1);
  const Region region{MemKind::kDram, reinterpret_cast<std::uint64_t>(buffer.data()), kBytes, 0, ""};
  auto local = std::move(*CHECK_OK(node.backend->add_region(region)));
  std::printf("%s %s %llu\n", to_hex(*CHECK_OK(node.backend->export_connection())).c_str(),
              to_hex(*CHECK_OK(node.backend->export_region(*local))).c_str(),
              static_cast<unsigned long long>(region.address));
  std::fflush(stdout);
  char line[64];
  while (std::fgets(line, sizeof line, stdin)) {
    if (line[0] == 'c') {  // compare with a pattern
      std::printf("%d\n", buffer == pattern(kBytes, static_cast<unsigned>(std::atoi(line + 1))));
    } else if (line[0] == 'n') {  // wait for a notification
      std::vector<Notification> seen;
      const Deadline deadline = Deadline::after(kPatience);
      while (seen.empty() && !deadline.passed()) {
        node.backend->notifier()->drain(seen);
        usleep(100);
      }
      std::printf("%s\n", seen.empty() ? "none" : (seen[0].sender + ":" + seen[0].message).c_str());
    } else if (line[0] == 'd') {  // deregister
      local.reset();
      std::printf("gone\n");
    }
    std::fflush(stdout);
  }
  std::_Exit(0);
}

struct Peer {
  // `netns`: the pid of a process in whose network namespace it runs.
  Peer(std::uint64_t peer_incarnation, const Params& params, const std::string& netns = "")
      : incarnation(peer_incarnation) {
    int in[2], out[2];
    CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
    char self[512] = {};
    CHECK(readlink("/proc/self/exe", self, sizeof self - 1) > 0);
    std::vector<std::string> words;
    if (!netns.empty())  // /sys shows the devices of whoever mounted it
      words = {
          "nsenter", "-t", netns, "-n", "unshare", "-m", "sh", "-c", "mount -t sysfs sysfs /sys && exec \"$0\" \"$@\""};
    words.insert(words.end(), {self, "peer", std::to_string(incarnation)});
    for (const auto& [key, value] : params) words.push_back(key + "=" + value);
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    pid = fork();
    if (pid == 0) {
      dup2(in[0], 0);
      dup2(out[1], 1);
      execvp(arguments[0], arguments.data());
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    to = fdopen(in[1], "w");
    from = fdopen(out[0], "r");
    const std::string hello = line();
    const std::size_t a = hello.find(' '), b = hello.rfind(' ');
    CHECK(a != std::string::npos && b > a);
    connection = from_hex(hello.substr(0, a));
    key = from_hex(hello.substr(a + 1, b - a - 1));
    address = std::stoull(hello.substr(b + 1));
  }
  ~Peer() {
    if (pid > 0) kill(pid, SIGKILL), waitpid(pid, nullptr, 0);
    fclose(to);
    fclose(from);
  }
  std::string line() {
    char* text = nullptr;
    std::size_t size = 0;
    const ssize_t got = getline(&text, &size, from);
    std::string out = got > 0 ? std::string(text, got - 1) : "";
    free(text);
    return out;
  }
  std::string ask(const std::string& question) {
    std::fprintf(to, "%s\n", question.c_str());
    std::fflush(to);
    return line();
  }
  std::uint64_t incarnation;
  pid_t pid = -1;
  FILE *to = nullptr, *from = nullptr;
  std::string connection, key;
  std::uint64_t address = 0;
};

// Our side with everything towards one peer.
struct Pair {
  Pair(const Params& ours, const Params& theirs, const std::string& netns = "", std::uint64_t incarnation = 2)
      : peer(incarnation, theirs, netns), node("initiator", 1, ours), buffer(pattern(kBytes, 2)) {
    const Region here{MemKind::kDram, reinterpret_cast<std::uint64_t>(buffer.data()), kBytes, 0, ""};
    const Region there{MemKind::kDram, peer.address, kBytes, 0, ""};
    local = std::move(*CHECK_OK(node.backend->add_region(here)));
    line = std::move(*CHECK_OK(node.backend->connect({"peer", peer.incarnation}, peer.connection)));
    remote = std::move(*CHECK_OK(node.backend->import_region(*line, there, peer.key)));
  }
  ~Pair() {
    transfer.reset();
    remote.reset();
    line.reset();
    local.reset();
  }
  // The whole buffer in `pieces` equal pieces, the remote ones in random order if asked for.
  void prepare(Op op, std::size_t pieces, bool scattered = false, std::size_t bytes = kBytes) {
    transfer.reset();
    Plan plan = plan_between(op, *line, *local, *remote);
    const std::size_t size = bytes / pieces;
    std::vector<std::size_t> order(pieces);
    std::iota(order.begin(), order.end(), 0);
    if (scattered) std::shuffle(order.begin(), order.end(), std::mt19937(3));
    for (const std::size_t piece : order)
      add_block(plan, reinterpret_cast<std::uint64_t>(buffer.data()) + piece * size, peer.address + piece * size, size);
    transfer = std::move(*CHECK_OK(node.backend->prepare(std::move(plan))));
  }
  Result<TransferState> finish(Nanoseconds patience = kPatience) {
    const Deadline deadline = Deadline::after(patience);
    for (;;) {
      auto state = transfer->poll();
      if (!state || *state == TransferState::kDone) return state;
      if (deadline.passed()) return state;
    }
  }
  Result<TransferState> run(Nanoseconds patience = kPatience) {
    auto state = transfer->submit({});
    return !state || *state == TransferState::kDone ? state : finish(patience);
  }
  Peer peer;
  Node node;
  std::vector<char> buffer;
  std::unique_ptr<LocalRegion> local;
  std::unique_ptr<Connection> line;
  std::unique_ptr<RemoteRegion> remote;
  std::unique_ptr<Transfer> transfer;
};

inline bool done(const Result<TransferState>& state) {
  if (!state) std::fprintf(stderr, "transfer: %s\n", state.error().reason.c_str());
  return state && *state == TransferState::kDone;
}

// Both operations, whole and scattered.
inline void check_data(Pair& pair) {
  pair.prepare(Op::kWrite, 1);
  CHECK(done(pair.run()));
  CHECK_EQ(pair.peer.ask("c 2"), "1");
  const std::vector<char> sent = pair.buffer;
  std::fill(pair.buffer.begin(), pair.buffer.end(), 0);
  pair.prepare(Op::kRead, 4096, true);
  CHECK(done(pair.run()));
  CHECK(pair.buffer == sent);
}

inline void stop(pid_t pid) {
  kill(pid, SIGSTOP);
  int status = 0;
  CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
}

// ---- two hosts ----

inline bool run_command(const std::string& command) {
  return std::system((command + " >/dev/null 2>&1").c_str()) == 0;
}

// A network namespace held by a child process, joined to ours by veth pairs: everything vanishes with the child.
struct TwoHosts {
  explicit TwoHosts(int num_links = 1) {
    int ready[2];
    CHECK(pipe2(ready, O_CLOEXEC) == 0);
    holder = fork();
    if (holder == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      const char ok = unshare(CLONE_NEWNET) == 0 ? 'y' : 'n';
      (void)!write(ready[1], &ok, 1);
      for (;;) pause();
    }
    char ok = 'n';
    (void)!read(ready[0], &ok, 1);
    close(ready[0]);
    close(ready[1]);
    pid = std::to_string(holder);
    name = "nx" + pid;
    enter = "nsenter -t " + pid + " -n ";
    made = ok == 'y' && run_command(enter + "ip link set lo up");
    for (int i = 0; i < num_links; ++i) made = made && join(i);
  }
  // The devices of link 0 are NAMEa and NAMEb, of link 1 NAMEc and NAMEd.
  bool join(int link) {
    const std::string here = name + static_cast<char>('a' + 2 * link), there = name + static_cast<char>('b' + 2 * link);
    const std::string subnet = "10." + std::to_string(97 + link) + "." + std::to_string(holder % 250) + ".";
    if (!run_command("ip link add " + here + " type veth peer name " + there + " netns " + pid) ||
        !run_command("ip addr add " + subnet + "1/24 dev " + here) || !run_command("ip link set " + here + " up") ||
        !run_command(enter + "ip addr add " + subnet + "2/24 dev " + there) ||
        !run_command(enter + "ip link set " + there + " up"))
      return false;
    const Deadline deadline = Deadline::after(kPatience);
    const auto up = [](const std::string& prefix, const std::string& device) {
      return run_command(prefix + "ip -o link show dev " + device + " | grep -q 'state UP'");
    };
    while (!(up("", here) && up(enter, there)) && !deadline.passed()) usleep(10'000);
    return true;
  }
  ~TwoHosts() {
    kill(holder, SIGKILL);
    waitpid(holder, nullptr, 0);
  }
  pid_t holder = -1;
  std::string pid, name, enter;
  bool made = false;
};

}  // namespace nixl::core::test
