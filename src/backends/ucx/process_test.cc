// The backend between processes and, where namespaces are permitted, between two hosts: data, notifications, peers that
// are killed, stopped and resumed.
#include "backends/ucx/entry.h"
#include "peer_cases.h"

using namespace nixl::core;
using namespace nixl::core::test;

namespace {

const Params kTcp = {{"UCX_TLS", "tcp"}};

TEST(data_between_processes_over_tcp) {
  Pair pair(kTcp, kTcp);
  check_data(pair);
  CHECK(pair.transfer->path().starts_with("tcp/"));
}

TEST(data_between_processes_with_kernel_copies) {
  const Params all = {{"UCX_TLS", "all"}};
  Pair pair(all, all);
  check_data(pair);
}

TEST(attached_notification_leaves_when_nobody_polls) {
  attached_notification_leaves_when_nobody_polls(kTcp);
}

TEST(killed_peer_is_lost_in_time) {
  for (const Op op : kBothOps)
    for (int round = 0; round < 3; ++round) killed_peer_is_lost_in_time(kTcp, op, round);
}

TEST(stopped_peer_stalls_and_goes_on) {
  for (const Op op : kBothOps) stopped_peer_stalls_and_goes_on(kTcp, op, 300'000'000);
}

TEST(what_a_stopped_peer_holds_is_cancelled_when_it_lets_go) {
  for (const Op op : kBothOps) what_a_stopped_peer_holds_is_cancelled_when_it_lets_go(kTcp, op);
}

TEST(closing_towards_a_stopped_peer_harms_nobody) {
  for (int round = 0; round < 6; ++round) {
    std::unique_ptr<Transfer> stuck;  // outlives the backend, as what cannot be stopped does with an agent
    Node node("initiator", 1, kTcp);
    Peer stopped(20, kTcp), other(21, kTcp);
    std::vector<char> buffer(kBytes);
    const Region here{MemKind::kDram, reinterpret_cast<std::uint64_t>(buffer.data()), kBytes, 0, ""};
    auto local = std::move(*CHECK_OK(node.backend->add_region(here)));
    const auto write_to = [&](Peer& peer, Connection& line, RemoteRegion& remote) {
      Plan plan = plan_between(Op::kWrite, line, *local, remote);
      add_block(plan, here.address, peer.address, kBytes);
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
  for (const Op op : kBothOps) deregistered_memory_is_refused_at_the_initiator(kTcp, op);
}

TEST(a_stranger_at_the_address_is_not_the_peer) {
  a_stranger_at_the_address_is_not_the_peer(kTcp);
}

TEST(restarted_peer_is_a_new_one_and_nothing_leaks) {
  Node node("initiator", 1, kTcp);
  int before = 0;
  for (int round = 0; round < 12; ++round) {
    {
      Peer peer(10u + static_cast<unsigned>(round), kTcp);
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
  idle_costs_nothing(kTcp);
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
  // Two namespaces have one boot id, so that UCX would try the loopback device between them: then the device is named.
  const auto over = [&](const char* end) { return Params{{"UCX_TLS", "tcp"}, {"UCX_NET_DEVICES", hosts.name + end}}; };
  {
    Pair pair(over("a"), over("b"), hosts.pid);
    check_data(pair);
    CHECK(pair.transfer->path().find(hosts.name) != std::string::npos);  // the veth device
    kill(pair.peer.pid, SIGKILL);
    CHECK(pair.run().error().code == Code::kPeerLost);
  }
  // A lossy, slow link: right bytes all the same.
  if (run_command("tc qdisc add dev " + hosts.name + "a root netem delay 2ms loss 1%")) {
    Pair pair(over("a"), over("b"), hosts.pid);
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
  tested = &backends_of_ucx()[0];
  if (argc == 2 && std::string(argv[1]) == "two hosts") {
    two_hosts_over_tcp();
    return 0;
  }
  return run_peer_tests(argc, argv);
}
