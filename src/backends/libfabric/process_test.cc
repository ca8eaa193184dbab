// The backend between processes and, where namespaces are permitted, between two hosts: data, notifications, peers that
// are killed, stopped and resumed.
#include "backends/libfabric/entry.h"
#include "peer_cases.h"

using namespace nixl::core;
using namespace nixl::core::test;

namespace {

const Params kTcp = {{"provider", "tcp"}};

TEST(data_between_processes) {
  for (const char* provider : {"tcp", "sockets"}) {
    const Params params = {{"provider", provider}};
    Pair pair(params, params);
    check_data(pair);
    CHECK(pair.transfer->path().starts_with(provider));
  }
}

TEST(data_with_a_thread_of_its_own_and_few_operations_in_flight) {
  const Params params = {
      {"provider", "tcp"}, {"num_threads", "1"}, {"post_queue_size", "3"}, {"split_batch_size", "2"}};
  Pair pair(params, params);
  check_data(pair);
  CHECK(pair.transfer->submit("after the data").has_value());
  CHECK_EQ(pair.peer.ask("n"), "initiator:after the data");
  CHECK(done(pair.finish()));
}

TEST(attached_notification_leaves_when_nobody_polls) {
  attached_notification_leaves_when_nobody_polls(kTcp);
}

TEST(killed_peer_is_lost_in_time) {
  killed_peer_is_lost_in_time(kTcp, Op::kWrite, 0);
  killed_peer_is_lost_in_time(kTcp, Op::kRead, 1);
  for (const Op op : kBothOps) killed_peer_is_lost_in_time(kTcp, op, 2);
  killed_peer_is_lost_in_time({{"provider", "sockets"}}, Op::kWrite, 2);
}

TEST(killed_peer_is_noticed_when_nothing_is_under_way) {
  Pair pair(kTcp, kTcp);
  pair.prepare(Op::kWrite, 4);
  CHECK(done(pair.run()));
  kill(pair.peer.pid, SIGKILL);
  const Deadline deadline = Deadline::after(kPatience);
  while (pair.node.lost.count == 0) {
    CHECK(!deadline.passed());
    usleep(10'000);
  }
}

TEST(stopped_peer_stalls_and_goes_on) {
  stopped_peer_stalls_and_goes_on(kTcp, Op::kWrite, 1'500'000'000);
  stopped_peer_stalls_and_goes_on(kTcp, Op::kRead, 200'000'000);
}

TEST(what_a_stopped_peer_holds_is_cancelled_when_it_lets_go) {
  for (const Op op : kBothOps) what_a_stopped_peer_holds_is_cancelled_when_it_lets_go(kTcp, op);
}

TEST(closing_towards_a_stopped_peer_harms_nobody) {
  std::unique_ptr<Transfer> stuck;  // outlives the backend, as what cannot be stopped does with an agent
  Pair fine(kTcp, kTcp);
  {
    Peer stopped(20, kTcp);
    auto line = std::move(*CHECK_OK(fine.node.backend->connect({"peer", 20}, stopped.connection)));
    CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
    const Region there{MemKind::kDram, stopped.address, kBytes, 0, ""};
    auto remote = std::move(*CHECK_OK(fine.node.backend->import_region(*line, there, stopped.key)));
    Plan plan = plan_between(Op::kWrite, *line, *fine.local, *remote);
    add_block(plan, reinterpret_cast<std::uint64_t>(fine.buffer.data()), stopped.address, kBytes);
    stuck = std::move(*CHECK_OK(fine.node.backend->prepare(std::move(plan))));
    stop(stopped.pid);
    CHECK(stuck->submit({}).has_value());
    (void)stuck->cancel();
    const Nanoseconds start = now_ns();
    remote.reset();
    line.reset();
    CHECK(now_ns() - start < 2'000'000'000);
    CHECK(!stuck->poll());
  }
  check_data(fine);
}

TEST(deregistered_memory_is_refused_at_the_initiator) {
  for (const Op op : kBothOps) deregistered_memory_is_refused_at_the_initiator(kTcp, op);
}

TEST(memory_that_goes_under_a_transfer_costs_the_transfer_and_not_the_peer) {
  for (const Op op : kBothOps) {
    Pair pair(kTcp, kTcp);
    pair.prepare(op, 4096, true);
    for (int round = 0; round < 3; ++round) CHECK(done(pair.run()));
    CHECK(pair.transfer->submit("never").has_value());
    CHECK_EQ(pair.peer.ask("d"), "gone");
    auto state = pair.finish();
    if (state) state = pair.run();
    CHECK(!state && state.error().code != Code::kPeerLost);
    CHECK_OK(pair.node.backend->notifier()->send(*pair.line, "still there"));
    const std::string seen = pair.peer.ask("n");
    CHECK(seen == "initiator:still there" || seen == "initiator:never");
    CHECK_EQ(pair.node.lost.count.load(), 0);
  }
}

TEST(a_stranger_at_the_address_is_not_the_peer) {
  a_stranger_at_the_address_is_not_the_peer(kTcp);
}

TEST(peers_with_other_providers_are_refused_at_once) {
  Peer peer(7, {{"provider", "sockets"}});
  Node node("initiator", 1, kTcp);
  const auto line = node.backend->connect({"peer", 7}, peer.connection);
  CHECK(!line && line.error().code == Code::kUnsupported);
  CHECK(check::has(line.error().reason, "sockets"));
}

TEST(restarted_peer_is_a_new_one_and_nothing_leaks) {
  Node node("initiator", 1, kTcp);
  int before = 0;
  for (int round = 0; round < 6; ++round) {
    {
      Peer peer(10u + static_cast<unsigned>(round), kTcp);
      auto line = std::move(*CHECK_OK(node.backend->connect({"peer", peer.incarnation}, peer.connection)));
      CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
      kill(peer.pid, SIGKILL);
      const Deadline deadline = Deadline::after(kPatience);
      while (node.lost.count <= round) {
        CHECK(!deadline.passed());
        (void)node.backend->notifier()->send(*line, "are you there");
        usleep(1000);
      }
    }
    if (round == 2) before = num_fds();
  }
  const Deadline deadline = Deadline::after(kPatience);
  while (num_fds() > before) CHECK(!deadline.passed());  // connections are closed as the node goes on
}

TEST(idle_costs_nothing) {
  idle_costs_nothing(kTcp);
}

// ---- two hosts ----

TEST(two_hosts_with_two_links) {
  TwoHosts hosts(2);
  if (!hosts.made) {
    std::fprintf(stderr, "SKIP two_hosts_with_two_links: a network namespace needs root, ip and nsenter\n");
    return;
  }
  Pair pair(kTcp, kTcp, hosts.pid);
  CHECK_OK(pair.line->wait_ready(Deadline::after(kPatience)));
  check_data(pair);
  for (const char* device : {"a", "c"}) CHECK(check::has(pair.transfer->path(), (hosts.name + device).c_str()));
  kill(pair.peer.pid, SIGKILL);
  CHECK(pair.run().error().code == Code::kPeerLost);
}

}  // namespace

int main(int argc, char** argv) {
  tested = &backends_of_libfabric()[0];
  return run_peer_tests(argc, argv);
}
