// What every network backend does towards a peer process that is killed, stopped or another one: the bodies of its tests, each with
// the parameters of both sides.
#pragma once
#include <time.h>

#include "peer_process.h"

namespace nixl::core::test {

inline constexpr Op kBothOps[] = {Op::kWrite, Op::kRead};

inline void attached_notification_leaves_when_nobody_polls(const Params& params) {
  Pair pair(params, params);
  pair.prepare(Op::kWrite, 16);
  CHECK(pair.transfer->submit("after the data").has_value());
  CHECK_EQ(pair.peer.ask("n"), "initiator:after the data");
  CHECK_EQ(pair.peer.ask("c 2"), "1");
  CHECK(done(pair.finish()));
}

// Round 0: before anything was said; 1: after a transfer; 2: well within one.
inline void killed_peer_is_lost_in_time(const Params& params, Op op, int round) {
  Pair pair(params, params);
  pair.prepare(op, 1024, true);
  if (round > 0) CHECK(done(pair.run()));
  CHECK(pair.transfer->submit("never").has_value());
  if (round == 2) CHECK_OK(pair.finish(500'000));
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

// Both sides have moved data once, and the peer is stopped within the next transfer.
inline void stop_within_a_transfer(Pair& pair, Op op) {
  pair.prepare(op, 64);
  CHECK(done(pair.run()));
  stop(pair.peer.pid);
  CHECK(pair.transfer->submit({}).has_value());
}

inline void stopped_peer_stalls_and_goes_on(const Params& params, Op op, Nanoseconds stopped_for) {
  Pair pair(params, params);
  stop_within_a_transfer(pair, op);
  const auto state = pair.finish(stopped_for);
  CHECK(state && *state == TransferState::kRunning);
  kill(pair.peer.pid, SIGCONT);
  CHECK(done(pair.finish()));
}

inline void what_a_stopped_peer_holds_is_cancelled_when_it_lets_go(const Params& params, Op op) {
  Pair pair(params, params);
  stop_within_a_transfer(pair, op);
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

inline void deregistered_memory_is_refused_at_the_initiator(const Params& params, Op op) {
  Pair pair(params, params);
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
  CHECK_EQ(pair.node.lost.count.load(), 0);
}

inline void a_stranger_at_the_address_is_not_the_peer(const Params& params) {
  Peer peer(7, params);
  Node node("initiator", 1, params);
  auto line = std::move(*CHECK_OK(node.backend->connect({"peer", 6}, peer.connection)));
  const auto ready = line->wait_ready(Deadline::after(kPatience));
  CHECK(!ready);
  CHECK(ready.error().code == Code::kPeerLost);
}

inline double cpu_seconds() {
  timespec cpu{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu);
  return static_cast<double>(cpu.tv_sec) + 1e-9 * static_cast<double>(cpu.tv_nsec);
}

inline void idle_costs_nothing(const Params& params) {
  Pair pair(params, params);
  pair.prepare(Op::kWrite, 4);
  CHECK(done(pair.run()));
  usleep(300'000);  // lets timers of the beginning pass
  const double before = cpu_seconds();
  usleep(1'000'000);
  const double used = cpu_seconds() - before;
  if (used >= 0.02) std::fprintf(stderr, "used %.3f s of CPU in 1 s\n", used);
  CHECK(used < 0.02);
}

inline int num_fds() {
  int count = 0;
  for (int fd = 0; fd < 4096; ++fd) count += fcntl(fd, F_GETFD) >= 0;
  return count;
}

// The tests of the backend `tested`, or the life of their peer.
inline int run_peer_tests(int argc, char** argv) {
#ifdef __SANITIZE_THREAD__
  SKIP(
      "the peer's buffer is written by the network's library, whose synchronisation the thread sanitizer cannot see; "
      "the "
      "backend's other test program covers threads");
#endif
  signal(SIGPIPE, SIG_IGN);
  const Probe probe = tested->probe();
  if (!probe.viable) SKIP(probe.reason.c_str());
  if (argc > 2 && std::string(argv[1]) == "peer") return serve(argv + 2);
  return check::run_tests(argc, argv);
}

}  // namespace nixl::core::test
