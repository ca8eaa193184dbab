// The backend between processes and, where namespaces are permitted, between two hosts: data, notifications, peers that
// are killed, stopped and resumed.
#include <arpa/inet.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <thread>

#include "backends/ucx/test_peer.h"
#include "base/fd.h"

using namespace nixl::core;
using namespace nixl::core::ucx::test;
using nixl::core::test::check_data;
using nixl::core::test::done;
using nixl::core::test::run_command;
using nixl::core::test::stop;

namespace {

TEST(data_between_processes_over_tcp) {
  Pair pair("tcp");
  check_data(pair);
  CHECK(pair.transfer->path().starts_with("tcp/"));
}

TEST(data_between_processes_with_kernel_copies) {
  Pair pair("all");
  check_data(pair);
}

TEST(attached_notification_leaves_when_nobody_polls) {
  Pair pair("tcp");
  pair.prepare(Op::kWrite, 16);
  CHECK(pair.transfer->submit("after the data").has_value());
  CHECK_EQ(pair.peer.ask("n"), "initiator:after the data");
  CHECK_EQ(pair.peer.ask("c 2"), "1");
  CHECK(done(pair.finish()));
}

TEST(killed_peer_is_lost_in_time) {
  for (const Op op : {Op::kWrite, Op::kRead}) {
    for (int round = 0; round < 3; ++round) {
      Pair pair("tcp");
      pair.prepare(op, 1024, true);
      if (round > 0) CHECK(done(pair.run()));
      CHECK(pair.transfer->submit("never").has_value());
      if (round == 2) CHECK_OK(pair.finish(500'000));  // well under way
      kill(pair.peer.pid, SIGKILL);
      const Nanoseconds start = now_ns();
      const auto state = pair.finish();
      if (!state) CHECK(state.error().code == Code::kPeerLost);
      CHECK(now_ns() - start < 10'000'000'000);
      while (pair.node.lost.count == 0) CHECK(now_ns() - start < 10'000'000'000);
      CHECK(pair.run().error().code == Code::kPeerLost);
      CHECK_EQ(pair.node.lost.count.load(), 1);
      CHECK(pair.node.backend->notifier()->send(*pair.line, "x").error().code == Code::kPeerLost);
    }
  }
}

TEST(stopped_peer_stalls_and_goes_on) {
  for (const Op op : {Op::kWrite, Op::kRead}) {
    Pair pair("tcp");
    pair.prepare(op, 64);
    CHECK(done(pair.run()));
    stop(pair.peer.pid);
    CHECK(pair.transfer->submit({}).has_value());
    const auto state = pair.finish(300'000'000);
    CHECK(state && *state == TransferState::kRunning);
    kill(pair.peer.pid, SIGCONT);
    CHECK(done(pair.finish()));
  }
}

TEST(what_a_stopped_peer_holds_is_cancelled_when_it_lets_go) {
  for (const Op op : {Op::kWrite, Op::kRead}) {
    Pair pair("tcp");
    pair.prepare(op, 64);
    CHECK(done(pair.run()));
    stop(pair.peer.pid);
    CHECK(pair.transfer->submit({}).has_value());
    for (int i = 0; i < 100; ++i) {
      CHECK(!pair.transfer->cancel());
      usleep(1000);
    }
    kill(pair.peer.pid, SIGCONT);
    const Deadline deadline = Deadline::after(kPatience);
    while (!pair.transfer->cancel()) CHECK(!deadline.passed());
    CHECK(pair.transfer->poll().error().code == Code::kCancelled);
    CHECK(done(pair.run()));
    if (op == Op::kWrite) CHECK_EQ(pair.peer.ask("c 2"), "1");
  }
}

TEST(closing_towards_a_stopped_peer_harms_nobody) {
  for (int round = 0; round < 6; ++round) {
    std::unique_ptr<Transfer> stuck;  // outlives the backend, as what cannot be stopped does with an agent
    Node node("initiator", 1, {{"UCX_TLS", "tcp"}});
    Peer stopped(20, "tcp"), other(21, "tcp");
    std::vector<char> buffer(kBytes);
    const Region here{MemKind::kDram, reinterpret_cast<std::uint64_t>(buffer.data()), kBytes, 0, ""};
    auto local = std::move(*CHECK_OK(node.backend->add_region(here)));
    const auto write_to = [&](Peer& peer, Connection& line, RemoteRegion& remote) {
      Plan plan;
      plan.op = Op::kWrite;
      plan.peer = &line;
      plan.local_address = {here.address};
      plan.remote_address = {peer.address};
      plan.length = {kBytes};
      plan.local_region = plan.remote_region = {0};
      plan.local_regions = {local.get()};
      plan.remote_regions = {&remote};
      plan.num_blocks = 1;
      plan.total_bytes = kBytes;
      return std::move(*CHECK_OK(node.backend->prepare(std::move(plan))));
    };
    auto line = std::move(*CHECK_OK(node.backend->connect({"peer", 20}, stopped.connection)));
    auto remote = std::move(
        *CHECK_OK(node.backend->import_region(*line, {MemKind::kDram, stopped.address, kBytes, 0, ""}, stopped.key)));
    stuck = write_to(stopped, *line, *remote);
    CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
    stop(stopped.pid);
    CHECK_OK(stuck->submit({}));
    usleep(20'000);
    CHECK(!stuck->cancel());
    remote.reset();
    line.reset();
    kill(stopped.pid, round % 2 ? SIGCONT : SIGKILL);
    auto other_line = std::move(*CHECK_OK(node.backend->connect({"peer", 21}, other.connection)));
    auto other_remote = std::move(
        *CHECK_OK(node.backend->import_region(*other_line, {MemKind::kDram, other.address, kBytes, 0, ""}, other.key)));
    auto fine = write_to(other, *other_line, *other_remote);
    const Deadline deadline = Deadline::after(kPatience);
    for (int i = 0; i < 4; ++i) {
      auto state = fine->submit({});
      while (state && *state == TransferState::kRunning) {
        CHECK(!deadline.passed());
        state = fine->poll();
      }
      CHECK(done(state));
    }
    fine.reset();
    other_remote.reset();
    other_line.reset();
    local.reset();
  }
}

TEST(deregistered_memory_is_refused_at_the_initiator) {
  for (const Op op : {Op::kRead, Op::kWrite}) {
    Pair pair("tcp");
    pair.prepare(op, 4);
    CHECK(done(pair.run()));
    CHECK_EQ(pair.peer.ask("d"), "gone");
    const Deadline deadline = Deadline::after(kPatience);
    Result<TransferState> state;
    do {
      state = pair.run();
      CHECK(!deadline.passed());
    } while (state);  // the notice may still be under way for the first ones
    CHECK(state.error().code == Code::kNotFound);
  }
}

TEST(a_stranger_at_the_address_is_not_the_peer) {
  Peer peer(7, "tcp");
  Node node("initiator", 1, {{"UCX_TLS", "tcp"}});
  auto line = std::move(*CHECK_OK(node.backend->connect({"peer", 6}, peer.connection)));
  const auto ready = line->wait_ready(Deadline::after(kPatience));
  CHECK(!ready);
  CHECK(ready.error().code == Code::kPeerLost);
}

TEST(restarted_peer_is_a_new_one_and_nothing_leaks) {
  Node node("initiator", 1, {{"UCX_TLS", "tcp"}});
  const auto num_fds = [] {
    int count = 0;
    for (int fd = 0; fd < 4096; ++fd) count += fcntl(fd, F_GETFD) >= 0;
    return count;
  };
  int before = 0;
  for (int round = 0; round < 12; ++round) {
    {
      Peer peer(10u + round, "tcp");
      auto line = std::move(*CHECK_OK(node.backend->connect({"peer", peer.incarnation}, peer.connection)));
      CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
      kill(peer.pid, SIGKILL);
      const Deadline deadline = Deadline::after(kPatience);
      while (node.lost.count <= round) CHECK(!deadline.passed());
    }
    if (round == 3) before = num_fds();
  }
  CHECK(num_fds() <= before);
}

TEST(idle_costs_nothing) {
  Pair pair("tcp");
  pair.prepare(Op::kWrite, 4);
  CHECK(done(pair.run()));
  timespec cpu{};
  usleep(300'000);  // lets wiring timers pass
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
  const double before = static_cast<double>(cpu.tv_sec) + 1e-9 * static_cast<double>(cpu.tv_nsec);
  usleep(1'000'000);
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
  const double used = static_cast<double>(cpu.tv_sec) + 1e-9 * static_cast<double>(cpu.tv_nsec) - before;
  if (used >= 0.02) std::fprintf(stderr, "used %.3f s of CPU in 1 s\n", used);
  CHECK(used < 0.02);
}

// ---- two hosts ----

// UCX reads the routing table once a process, so this one runs in a process of its own that starts after the link is
// made.
void two_hosts_over_tcp() {
  TwoHosts hosts;
  if (!hosts.made) {
    std::fprintf(stderr, "SKIP two_hosts_over_tcp: a network namespace needs root, ip and nsenter\n");
    return;
  }
  {
    Pair pair("tcp", hosts);
    check_data(pair);
    CHECK(pair.transfer->path().find(hosts.name) != std::string::npos);  // the veth device
    kill(pair.peer.pid, SIGKILL);
    CHECK(pair.run().error().code == Code::kPeerLost);
  }
  // A lossy, slow link: right bytes all the same.
  if (run_command("tc qdisc add dev " + hosts.name + "a root netem delay 2ms loss 1%")) {
    Pair pair("tcp", hosts);
    pair.prepare(Op::kWrite, 64, true, 4 << 20);
    CHECK(done(pair.run()));
    pair.prepare(Op::kRead, 64, true, 4 << 20);
    CHECK(done(pair.run()));
  } else {
    std::fprintf(stderr, "SKIP lossy link: tc netem is not available\n");
  }
}

TEST(two_hosts_over_tcp) {
  const pid_t child = fork();
  if (child == 0) {
    execl("/proc/self/exe", "ucx_process_test", "two hosts", nullptr);
    _exit(127);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main(int argc, char** argv) {
#ifdef __SANITIZE_THREAD__
  SKIP(
      "the peer's buffer is written by UCX, whose synchronisation the thread sanitizer cannot see; ucx_test covers "
      "threads");
#endif
  signal(SIGPIPE, SIG_IGN);
  const Probe probe = backends_of_ucx()[0].probe();
  if (!probe.viable) SKIP(probe.reason.c_str());
  nixl::core::test::tested = &backends_of_ucx()[0];
  if (argc > 2 && std::string(argv[1]) == "peer") return nixl::core::test::serve(argv + 2);
  if (argc == 2 && std::string(argv[1]) == "two hosts") {
    two_hosts_over_tcp();
    return 0;
  }
  return check::run_tests(argc, argv);
}
