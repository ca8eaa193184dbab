// Writes that the target pulls, with real second processes that are stopped and killed in the middle of it.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "backends/samehost/connection.h"
#include "backends/samehost/pull_board.h"
#include "backends/samehost/test_process.h"

using namespace nixl::core;
using namespace nixl::core::samehost::test;
using samehost::PullBoard;

namespace {

constexpr std::size_t kBytes = 48 << 20;
constexpr Nanoseconds kPatience = 60'000'000'000;

struct Lost : Events {
  std::atomic<int> count{0};
  void peer_lost(const PeerId&, Error) noexcept override { ++count; }
};

// Seen by both processes, so that the initiator can look at what was written, but for the backend as any other memory.
class BothSee {
 public:
  BothSee() : base_(::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)) {
    CHECK(base_ != MAP_FAILED);
  }
  ~BothSee() { ::munmap(base_, kBytes); }
  BothSee(const BothSee&) = delete;
  operator char*() const { return static_cast<char*>(base_); }

 private:
  void* const base_;
};

// A puller written out: arms a chunk, is stopped before its call, and goes on later. Answers what the call gave then.
std::string pull_and_stop(int fd) {
  const auto pid = static_cast<pid_t>(std::stol(read_text(fd)));
  const std::string file = read_text(fd);
  const PullBoard board =
      std::move(*CHECK_OK(PullBoard::map(Fd(::open(file.c_str(), O_RDWR)), std::stoull(read_text(fd)))));
  const auto source = std::stoull(read_text(fd)), target = std::stoull(read_text(fd));
  for (;;) {
    const std::uint64_t offer = board->offer.load();
    const std::uint32_t count = kBytes / samehost::kOfferedChunkBytes;
    const std::uint32_t chunk = offer == 0 ? count : board.take(offer, count, samehost::kFree);
    if (chunk == count) continue;
    board->joined.store(offer);
    auto& slot = board->pullers[0];
    slot.thread.store(static_cast<std::uint32_t>(::getpid()));
    const std::uint64_t offset = chunk * samehost::kOfferedChunkBytes;
    slot.source = {reinterpret_cast<void*>(source + offset), samehost::kOfferedChunkBytes};
    slot.target = {reinterpret_cast<void*>(target + offset), samehost::kOfferedChunkBytes};
    slot.chunk.store(offer << 32 | (chunk + 1));
    if (!board.change(offer, chunk, samehost::kFree, samehost::kPulled)) continue;
    ::raise(SIGSTOP);
    return std::to_string(::process_vm_readv(pid, &slot.target, 1, &slot.source, 1, 0));
  }
}

// A second process; a thread of it serves its backend unless `idle`.
struct Target : TargetProcess {
  explicit Target(char* memory, bool idle = false) : TargetProcess([&](int fd) { serve(fd, memory, idle); }) {}
  static void serve(int fd, char* memory, bool idle) {
    auto backend = open_backend("target");
    auto region = std::move(*CHECK_OK(backend->add_region(region_of(memory, kBytes))));
    send_address_and_key(fd, *backend, *region);
    std::thread thread([&] {
      while (!idle) {
        if (backend->progress() || !backend->arm()) continue;
        pollfd wait{backend->event_fd(), POLLIN, 0};
        ::poll(&wait, 1, 1000);
      }
    });
    for (char what; ::read(fd, &what, 1) == 1;) {
      std::string answer;
      if (what == 'd') region.reset();
      if (what == 's') answer = pull_and_stop(fd);
      if (what == 'm') {
        std::vector<Notification> got;
        while (got.empty()) backend->notifier()->drain(got);
        for (const auto& n : got) answer += n.message;
      }
      send_text(fd, answer);
    }
    ::_exit(0);
  }
};

// Our process: a backend that is connected to the target, and as much memory.
struct Initiator {
  Initiator(const Target& target, char* far)
      : backend(open_backend("initiator", &lost)),
        far(far),
        link(*backend, target.address, target.key, region_of(near, kBytes), region_of(far, kBytes)) {
    CHECK_OK(backend->export_connection());  // allows the target to read from us
  }
  std::unique_ptr<Transfer> write(std::vector<std::pair<std::uint64_t, std::uint64_t>> rows = {{0, kBytes}}) {
    Plan plan = link.plan(Op::kWrite);
    for (const auto& [offset, bytes] : rows) add_block(plan, at(near) + offset, at(far) + offset, bytes);
    return std::move(*CHECK_OK(backend->prepare(std::move(plan))));
  }
  void fill(unsigned salt) {
    for (std::size_t i = 0; i < kBytes; i += 8) {
      const std::uint64_t word = i * 0x9e3779b97f4a7c15u + salt;
      std::memcpy(near + i, &word, 8);
    }
  }
  samehost::PeerConnection& connection() { return static_cast<samehost::PeerConnection&>(*link.peer); }
  const PullBoard& board() { return connection().pull_desk()->board; }
  std::uint32_t pulled() { return board()->pulled.load(); }

  Lost lost;
  std::unique_ptr<Backend> backend;
  const BothSee near;
  char* const far;
  const Link link;
};

Result<void> finish(Transfer& transfer) {
  const Nanoseconds limit = now_ns() + kPatience;
  for (;;) {
    NIXL_ASSIGN(const TransferState state, transfer.poll());
    if (state == TransferState::kDone) return {};
    CHECK(now_ns() < limit);
  }
}
// Submits until the target has pulled a chunk of a submission that still runs.
void submit_until_pulled(Initiator& side, Transfer& transfer) {
  for (const Nanoseconds limit = now_ns() + kPatience;;) {
    CHECK(now_ns() < limit);
    const std::uint32_t before = side.pulled();
    CHECK_OK(transfer.submit("message"));
    for (;;) {
      const auto state = CHECK_OK(transfer.poll());
      if (*state == TransferState::kDone) break;
      if (side.pulled() != before) return;
    }
  }
}

}  // namespace

TEST(the_target_pulls_every_byte) {
  const BothSee far;
  Target target(far);
  Initiator side(target, far);
  const std::vector<std::vector<std::pair<std::uint64_t, std::uint64_t>>> lists{
      {{0, kBytes}},
      {{1, kBytes - 3}},                                          // nothing aligned, a last chunk of a part
      {{0, 4 << 20}, {4 << 20, 8 << 20}, {20 << 20, 300 << 10}},  // neighbours, a short one
      {{30 << 20, 10'000'001}, {5, (1 << 20) + 1}, {8 << 20, 512 << 10}}};
  for (const auto& list : lists) {
    auto transfer = side.write(list);
    const std::uint32_t before = side.pulled();
    const Nanoseconds limit = now_ns() + kPatience;
    for (unsigned round = 0; round < 20 || side.pulled() == before; ++round) {
      CHECK(now_ns() < limit);
      side.fill(round);
      std::memset(far, 0, kBytes);
      CHECK_OK(run(*transfer));
      std::size_t end = 0;
      auto sorted = list;
      std::sort(sorted.begin(), sorted.end());
      for (const auto& [offset, bytes] : sorted) {
        CHECK(!std::memcmp(side.near + offset, far + offset, bytes));
        CHECK(offset == end || far[offset - 1] == 0);
        end = offset + bytes;
      }
      CHECK(end == kBytes || far[end] == 0);
    }
  }
}

TEST(messages_leave_after_the_last_chunk) {
  const BothSee far;
  Target target(far);
  Initiator side(target, far);
  auto transfer = side.write();
  CHECK_OK(transfer->submit("after"));
  CHECK_OK(finish(*transfer));
  CHECK_EQ(target.ask('m'), std::string("after"));
}

TEST(nothing_short_is_offered) {
  const BothSee far;
  Target target(far);
  Initiator side(target, far);
  std::vector<std::pair<std::uint64_t, std::uint64_t>> scattered;
  for (std::uint64_t i = 0; i < kBytes; i += 128 << 10) scattered.push_back({i, 64 << 10});
  for (const auto& list : {scattered, {{0, 4 << 20}}}) {
    CHECK_OK(run(*side.write(list)));
    CHECK_EQ(side.board()->offer.load() + side.connection().pull_desk()->last_offer, 0u);
  }
}

TEST(a_target_stopped_in_the_middle_holds_nothing_up) {
  const BothSee far;
  Target target(far);
  Initiator side(target, far);
  auto transfer = side.write();
  for (unsigned round = 0; round < 20; ++round) {
    side.fill(round);
    std::memset(far, 0, kBytes);
    submit_until_pulled(side, *transfer);
    ::kill(target.pid, SIGSTOP);
    CHECK_OK(finish(*transfer));
    CHECK(!std::memcmp(side.near, far, kBytes));
    // What was given back to the caller is not read any more.
    std::memset(side.near, 0x5a, kBytes);
    ::kill(target.pid, SIGCONT);
    for (const auto& puller : side.board()->pullers)
      for (const Nanoseconds limit = now_ns() + kPatience; puller.chunk.load() != 0;) CHECK(now_ns() < limit);
    for (std::size_t i = 0; i < kBytes; i += samehost::kOfferedChunkBytes)
      CHECK(std::memcmp(far + i, side.near + i, 4096) != 0);
  }
}

TEST(a_chunk_that_was_taken_back_is_not_written_later) {
  const BothSee far;
  Target target(far, true);
  Initiator side(target, far);
  side.fill(1);
  auto transfer = side.write();
  target.tell('s');
  send_text(target.fd, std::to_string(::getpid()));
  send_text(target.fd, "/proc/" + std::to_string(::getpid()) + "/fd/" + std::to_string(side.board().fd()));
  send_text(target.fd, std::to_string(side.board()->id));
  send_text(target.fd, std::to_string(at(side.near)));
  send_text(target.fd, std::to_string(at(far)));
  int status = 0;
  for (const Nanoseconds limit = now_ns() + kPatience; ::waitpid(target.pid, &status, WUNTRACED | WNOHANG) == 0;) {
    CHECK(now_ns() < limit);
    std::memset(far, 0, kBytes);
    CHECK_OK(run(*transfer));
    CHECK(!std::memcmp(side.near, far, kBytes));
  }
  CHECK(WIFSTOPPED(status));
  std::memset(side.near, 0x5a, kBytes);
  const std::string before(far, kBytes);
  ::kill(target.pid, SIGCONT);
  CHECK_EQ(read_text(target.fd), std::string("0"));
  CHECK(!std::memcmp(before.data(), far, kBytes));
}

TEST(a_target_killed_in_the_middle_is_lost) {
  const BothSee far;
  for (int round = 0; round < 5; ++round) {
    Target target(far);
    Initiator side(target, far);
    auto transfer = side.write();
    submit_until_pulled(side, *transfer);
    ::kill(target.pid, SIGKILL);
    Result<void> result = finish(*transfer);
    for (const Nanoseconds limit = now_ns() + kPatience; result && now_ns() < limit;) result = run(*transfer);
    CHECK(!result && result.error().code == Code::kPeerLost);
    for (int i = 0; i < 100; ++i) side.backend->progress();
    CHECK_EQ(side.lost.count.load(), 1);
    CHECK(run(*transfer).error().code == Code::kPeerLost);
  }
}

TEST(memory_deregistered_in_the_middle_is_an_error) {
  const BothSee far;
  for (int round = 0; round < 5; ++round) {
    Target target(far);
    Initiator side(target, far);
    auto transfer = side.write();
    submit_until_pulled(side, *transfer);
    target.tell('d');
    (void)finish(*transfer);  // it may have been through by then
    CHECK_EQ(read_text(target.fd), std::string());
    const auto result = run(*transfer);
    CHECK(!result && result.error().code == Code::kNotFound);
  }
}

TEST(cancelled_in_the_middle_ends) {
  const BothSee far;
  Target target(far);
  Initiator side(target, far);
  auto transfer = side.write();
  int cancelled = 0;
  for (int round = 0; round < 10; ++round) {
    submit_until_pulled(side, *transfer);
    const Nanoseconds limit = now_ns() + kPatience;
    while (!transfer->cancel()) CHECK(now_ns() < limit);
    const auto state = transfer->poll();
    CHECK(state || state.error().code == Code::kCancelled);
    if (state) continue;
    ++cancelled;
    // Nobody writes any more.
    std::memset(far, 0, kBytes);
    for (const auto& puller : side.board()->pullers)
      for (const Nanoseconds limit = now_ns() + kPatience; puller.chunk.load() != 0;) CHECK(now_ns() < limit);
    for (std::size_t i = 0; i < kBytes; i += 4096) CHECK_EQ(far[i], 0);
  }
  CHECK(cancelled > 0);
}

TEST(an_initiator_killed_in_the_middle_harms_no_other) {
  const BothSee far;
  Target target(far);
  for (int round = 0; round < 5; ++round) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      Initiator side(target, far);
      auto transfer = side.write();
      submit_until_pulled(side, *transfer);
      ::kill(::getpid(), SIGKILL);
    }
    int status = 0;
    ::waitpid(pid, &status, 0);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
  }
  Initiator side(target, far);
  auto transfer = side.write();
  side.fill(9);
  submit_until_pulled(side, *transfer);
  CHECK_OK(finish(*transfer));
  CHECK(!std::memcmp(side.near, far, kBytes));
}

TEST(offers_that_make_no_sense_are_dropped) {
  const BothSee far;
  Target target(far);
  Initiator side(target, far);
  side.fill(3);
  const auto& theirs = static_cast<samehost::FarRegion&>(*side.link.theirs);
  const samehost::OfferedRow good{at(side.near), at(far), 4 << 20, theirs.slot(), theirs.generation()};
  samehost::Offer offer{*CHECK_OK(side.backend->export_connection()),
                        static_cast<std::uint32_t>(side.board().fd()),
                        side.board()->id,
                        1,
                        {good}};
  for (std::uint64_t chunk = 0; chunk < 4; ++chunk) side.board()->chunks[chunk].store(samehost::chunk_word(1, 0));
  side.board()->offer.store(1);
  const std::string bytes = offer.encode();
  for (std::size_t cut = 0; cut < bytes.size(); cut += 9) {
    CHECK(!samehost::Offer::decode(std::string_view(bytes).substr(0, cut)));
    side.connection().offer(std::string_view(bytes).substr(0, cut));
  }
  const auto send = [&](auto change) {
    samehost::Offer other = offer;
    change(other);
    side.connection().offer(other.encode());
  };
  send([](auto& o) { o.rows[0].slot = 1 << 20; });
  send([](auto& o) { ++o.rows[0].generation; });
  send([](auto& o) { o.rows[0].target -= 1; });
  send([](auto& o) { o.rows[0].target += kBytes - (4 << 20) + 1; });
  send([](auto& o) { o.rows[0].target = ~0ull - 100; });
  send([](auto& o) { o.rows[0].bytes = 0; });
  send([](auto& o) { o.rows[0].bytes = ~0ull; });
  send([](auto& o) { o.number = 77; });
  send([](auto& o) { o.address[8] ^= 1; });
  send([](auto& o) { ++o.board_id; });
  send([](auto& o) { o.board_fd = 0, ++o.board_id; });
  // In the order of the lane: once this one is through, the others were looked at.
  side.connection().offer(bytes);
  for (const Nanoseconds limit = now_ns() + kPatience; side.board()->joined.load() != 1;) CHECK(now_ns() < limit);
  for (std::uint32_t chunk = 0; chunk < 4; ++chunk)
    for (const Nanoseconds limit = now_ns() + kPatience; side.board().state(chunk) != samehost::kMoved;)
      CHECK(now_ns() < limit);
  for (std::size_t i = 4 << 20; i < kBytes; i += 4096) CHECK_EQ(far[i], 0);
  CHECK(!std::memcmp(far, side.near, 4 << 20));
}

TEST(switched_off_nothing_is_pulled) {
  ::setenv("NIXL_SAME_HOST_PULL", "n", 1);
  const BothSee far;
  Target target(far);
  ::unsetenv("NIXL_SAME_HOST_PULL");
  Initiator side(target, far);
  side.fill(4);
  auto transfer = side.write();
  for (int round = 0; round < 10; ++round) CHECK_OK(run(*transfer));
  CHECK(!std::memcmp(far, side.near, kBytes));
  CHECK_EQ(side.pulled(), 0u);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
