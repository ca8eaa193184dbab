// Ranks as processes that are killed and stopped at any instant, and every wait site expired once.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "ep/cpu/exchange.h"
#include "ep/cpu/test_ranks.h"

namespace {

using namespace nixl::core;
using namespace nixl::core::ep;
using namespace nixl::core::ep::test;

constexpr Nanoseconds kMs = 1'000'000;

void sleep_ms(int ms) {
  std::this_thread::sleep_for(std::chrono::milliseconds(ms));
}

// What processes of one test tell each other.
struct Board {
  std::atomic<int> round[8];
  std::atomic<Nanoseconds> detected[8];
  std::atomic<int> lost[8];  // bit of each rank that was masked here
  std::atomic<int> phase{0};
};
Board& make_board() {
  void* memory = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  return *new (memory) Board;
}

// A group whose ranks live in children: rank r runs `body` on its own path.
class Processes {
 public:
  Processes(const Shape& shape, Nanoseconds timeout_ns, const std::function<void(TestRank&)>& body) {
    auto group = make_group(shape, timeout_ns);
    for (auto& rank : group) {
      const pid_t child = fork();
      if (child == 0) {
        alarm(50);
        body(*rank);
        _exit(0);
      }
      children_.push_back(child);
    }
  }
  void signal(int rank, int number) const { kill(children_[static_cast<std::size_t>(rank)], number); }
  // Exit status 0, or -signal.
  int wait(int rank) const {
    int status = 0;
    waitpid(children_[static_cast<std::size_t>(rank)], &status, 0);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
  }

 private:
  std::vector<pid_t> children_;
};

// `rounds` rounds, or fewer: `rounds_after` the first fault. What was received is checked every time.
void serve(TestRank& rank, Board& board, std::uint32_t rounds, int rounds_after = -1) {
  std::vector<int> present = all_ranks(rank.shape.ranks);
  int left = -1;
  for (std::uint32_t round = 0; round < rounds && left != 0; ++round) {
    board.round[rank.rank] = static_cast<int>(round);
    const Dispatch dispatch = rank.dispatch_args(round);
    CHECK_OK(rank.path->dispatch(dispatch));
    const auto settle = [&] {
      for (const Fault& fault : rank.path->take_faults()) {
        if (board.detected[rank.rank] == 0) board.detected[rank.rank] = now_ns();
        board.lost[rank.rank] |= 1 << fault.rank;
        std::erase(present, fault.rank);
        if (left < 0) left = rounds_after;
      }
    };
    settle();
    rank.check_dispatch(round, present);
    const CombineArgs combine = rank.combine_args();
    CHECK_OK(rank.path->combine(combine));
    settle();
    rank.check_combine(present, Combine::kExact);
    if (left > 0) --left;
  }
}

TEST(killed_ranks_are_masked_in_time_and_alone) {
  const Shape shape{4, 2, 4, 512, 2};
  std::vector<Nanoseconds> delays;
  for (int trial = 0; trial < 12; ++trial) {
    Board& board = make_board();
    Processes processes(shape, 500 * kMs, [&](TestRank& rank) { serve(rank, board, 40); });
    while (board.round[1] < 2 + trial) sleep_ms(1);
    std::this_thread::sleep_for(std::chrono::microseconds(137 * trial));
    const int victim = trial % 4;
    const Nanoseconds when = now_ns();
    processes.signal(victim, SIGKILL);
    CHECK_EQ(processes.wait(victim), -SIGKILL);
    for (int rank = 0; rank < 4; ++rank) {
      if (rank == victim) continue;
      CHECK_EQ(processes.wait(rank), 0);
      CHECK_EQ(board.lost[rank].load(), 1 << victim);  // exactly the victim
      delays.push_back(board.detected[rank] - when);
    }
  }
  std::sort(delays.begin(), delays.end());
  std::fprintf(stderr, "timeout 500 ms; detected after %.0f (least), %.0f (median), %.0f (most) ms\n",
               delays.front() / 1e6, delays[delays.size() / 2] / 1e6, delays.back() / 1e6);
  CHECK(delays.back() < 3000 * kMs);
}

TEST(a_stopped_rank_wakes_to_find_itself_masked) {
  const Shape shape{3, 2, 4, 512, 2};
  for (int trial = 0; trial < 4; ++trial) {
    Board& board = make_board();
    Processes processes(shape, 400 * kMs, [&](TestRank& rank) { serve(rank, board, 40, rank.rank == 1 ? 2 : -1); });
    while (board.round[1] < 1 + 3 * trial) sleep_ms(1);
    std::this_thread::sleep_for(std::chrono::microseconds(211 * trial));
    processes.signal(1, SIGSTOP);
    for (int rank : {0, 2}) {
      CHECK_EQ(processes.wait(rank), 0);  // they went on without it and checked every round
      CHECK_EQ(board.lost[rank].load(), 1 << 1);
    }
    processes.signal(1, SIGCONT);
    CHECK_EQ(processes.wait(1), 0);
    CHECK_EQ(board.lost[1].load(), 1 << 0 | 1 << 2);
  }
}

TEST(a_stopped_rank_is_unmasked_without_a_connect) {
  const Shape shape{3, 2, 4, 512, 2};
  for (int trial = 0; trial < 4; ++trial) {
    Board& board = make_board();
    Processes processes(shape, 400 * kMs, [&](TestRank& rank) {
      serve(rank, board, 1000, rank.rank == 1 ? 1 : 5 + rank.rank + trial);  // they do not even stop at the same round
      ++board.phase;
      while (board.phase < 3) sleep_ms(1);
      rank.unmask(all_ranks(3));
      for (std::uint32_t round = 500; round < 510; ++round) {
        CHECK_OK(rank.path->dispatch(rank.dispatch_args(round)));
        rank.check_dispatch(round, {0, 1, 2});
        CHECK_OK(rank.path->combine(rank.combine_args()));
        rank.check_combine({0, 1, 2}, Combine::kExact);
      }
      CHECK(rank.path->take_faults().empty());
    });
    while (board.round[1] < 2 + trial) sleep_ms(1);
    processes.signal(1, SIGSTOP);
    while (board.lost[0] == 0 || board.lost[2] == 0) sleep_ms(1);
    processes.signal(1, SIGCONT);
    for (int rank = 0; rank < 3; ++rank) CHECK_EQ(processes.wait(rank), 0);
  }
}

// The victim reaches rank 0 before it dies, but not rank 2: rank 0 is an operation ahead and waits for rank 2, which is
// held up by the victim. Nobody but the victim may be masked.
TEST(masks_do_not_cascade) {
  const Shape shape{3, 1, 4, 256, 2};
  auto group = make_group(shape, 600 * kMs);
  CHECK_OK(group[1]->path->set_mask(std::vector<int>{2}, true, nullptr));  // rank 1 will not send to rank 2
  std::thread victim([&] { CHECK_OK(group[1]->path->dispatch(group[1]->dispatch_args(1))); });
  const auto survive = [&](TestRank& rank) {
    for (std::uint32_t round = 1; round < 4; ++round) CHECK_OK(rank.path->dispatch(rank.dispatch_args(round)));
    const std::vector<Fault> faults = rank.path->take_faults();
    CHECK_EQ(faults.size(), std::size_t{1});
    CHECK_EQ(faults[0].rank, 1);
  };
  std::thread first([&] { survive(*group[0]); });
  sleep_ms(200);  // rank 0 is well into its wait when rank 2's begins, which then ends later
  std::thread second([&] { survive(*group[2]); });
  for (std::thread* thread : {&victim, &first, &second}) thread->join();
}

// Rank 1 is missing at each site in turn.
TEST(every_wait_site_expires) {
  const Shape shape{2, 1, 4, 256, 2};
  for (WaitSite site : {WaitSite::kDispatch, WaitSite::kCombineWeights, WaitSite::kCombineRows, WaitSite::kBarrier}) {
    for (Combine mode : {Combine::kExact, Combine::kReduced}) {
      if (site == WaitSite::kCombineWeights && mode == Combine::kExact) continue;
      auto group = make_group(shape, 250 * kMs, mode);
      if (site != WaitSite::kDispatch && site != WaitSite::kBarrier)
        on_threads(group, [&](TestRank& rank) { CHECK_OK(rank.path->dispatch(rank.dispatch_args(1))); });
      const Nanoseconds start = now_ns();
      nixl::ep::Phase phase = nixl::ep::Phase::kCombine;
      if (site == WaitSite::kDispatch) {
        CHECK_OK(group[0]->path->dispatch(group[0]->dispatch_args(1)));
        group[0]->check_dispatch(1, {0});
        phase = nixl::ep::Phase::kDispatch;
      } else if (site == WaitSite::kBarrier) {
        CHECK_OK(group[0]->path->barrier(nullptr));
        phase = nixl::ep::Phase::kBarrier;
      } else {
        CombineArgs args = group[0]->combine_args();
        CombineArgs theirs = group[1]->combine_args();
        if (site == WaitSite::kCombineRows && mode == Combine::kReduced)  // sends its weights, but never its rows
          CHECK_OK(group[1]->path->combine_send(theirs));
        CHECK_OK(group[0]->path->combine(args));
        group[0]->check_combine({0}, mode);
      }
      const Nanoseconds took = now_ns() - start;
      CHECK(took >= 250 * kMs && took < 3000 * kMs);
      const std::vector<Fault> faults = group[0]->path->take_faults();
      CHECK_EQ(faults.size(), std::size_t{1});
      CHECK_EQ(faults[0].rank, 1);
      CHECK(faults[0].phase == phase);
      CHECK(static_cast<std::int32_t*>(group[0]->path->fault_view().data)[1] != 0);
      std::fprintf(stderr, "  %s: %.1f ms\n", name(site), took / 1e6);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
