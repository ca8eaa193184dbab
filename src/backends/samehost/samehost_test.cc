// Two backends in one process, and real second processes that are killed, stopped, and lose their memory.
#include <dirent.h>
#include <poll.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <random>

#include "backends/samehost/test_process.h"
#include "base/bytes.h"

using namespace nixl::core;
using namespace nixl::core::samehost::test;

namespace {

constexpr std::size_t kBytes = 16 << 20;

struct Lost : Events {
  std::atomic<int> count{0};
  void peer_lost(const PeerId&, Error why) noexcept override {
    CHECK(why.code == Code::kPeerLost);
    ++count;
  }
};

struct Side {
  explicit Side(const char* name) : backend(open_backend(name, &lost)) {}
  Lost lost;
  std::unique_ptr<Backend> backend;
};

char* shared_bytes(std::size_t bytes = kBytes) {
  void* const p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(p != MAP_FAILED);
  return static_cast<char*>(p);
}

// A second process that does what it is told, one letter at a time.
struct Target : TargetProcess {
  explicit Target(char* memory, std::size_t bytes = kBytes, unsigned user = 0)
      : TargetProcess([&](int fd) {
          if (user != 0) CHECK_EQ(::setuid(user), 0);
          serve(fd, memory, bytes);
        }) {}
  static void serve(int fd, char* memory, std::size_t bytes) {
    Side side("target");
    auto region = std::move(*CHECK_OK(side.backend->add_region(region_of(memory, bytes))));
    send_address_and_key(fd, *side.backend, *region);
    for (char what; ::read(fd, &what, 1) == 1;) {
      std::string answer;
      if (what == 'd') region.reset();
      if (what == 'u') ::munmap(memory, bytes);
      if (what == 'n') {  // one message: "sender:message"
        std::vector<Notification> got;
        while (got.empty()) {
          side.backend->progress();
          side.backend->notifier()->drain(got);
        }
        for (const auto& n : got) answer += n.sender + ":" + n.message + "\n";
      }
      if (what == 'e') {  // sleeps until a message arrives
        std::vector<Notification> got;
        while (got.empty()) {
          if (side.backend->arm()) {
            pollfd wait{side.backend->event_fd(), POLLIN, 0};
            ::poll(&wait, 1, 10000);
          }
          side.backend->progress();
          side.backend->notifier()->drain(got);
        }
        answer = got[0].message;
      }
      send_text(fd, answer);
    }
  }
};

std::size_t open_fds() {
  std::size_t count = 0;
  DIR* dir = ::opendir("/proc/self/fd");
  while (::readdir(dir)) ++count;
  ::closedir(dir);
  return count;
}

}  // namespace

TEST(scattered_lists_between_processes) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(kBytes);
  std::mt19937 random(1);
  for (char& c : mine) c = static_cast<char>(random());
  Target target(theirs);
  Side side("initiator");
  Link link(*side.backend, target.address, target.key, region_of(mine.data(), kBytes), region_of(theirs, kBytes));
  for (const std::size_t piece : {1, 63, 4096, 65536}) {
    std::vector<std::size_t> order(std::min<std::size_t>(5000, kBytes / piece));
    std::iota(order.begin(), order.end(), 0);
    auto target_order = order;
    std::shuffle(order.begin(), order.end(), random);
    std::shuffle(target_order.begin(), target_order.end(), random);
    for (const Op op : {Op::kWrite, Op::kRead}) {
      std::memset(op == Op::kWrite ? theirs : mine.data(), 0, kBytes);
      char* const from = op == Op::kWrite ? mine.data() : theirs;
      for (std::size_t i = 0; i < kBytes; ++i) from[i] = static_cast<char>(i * 31 + piece);
      Plan plan = link.plan(op);
      for (std::size_t i = 0; i < order.size(); ++i)
        add_block(plan, at(mine.data() + order[i] * piece), at(theirs + target_order[i] * piece), piece);
      auto transfer = std::move(*CHECK_OK(side.backend->prepare(std::move(plan))));
      for (int repeat = 0; repeat < 3; ++repeat) CHECK_OK(run(*transfer));
      for (std::size_t i = 0; i < order.size(); ++i)
        CHECK(!std::memcmp(mine.data() + order[i] * piece, theirs + target_order[i] * piece, piece));
    }
  }
}

TEST(strided_runs_and_one_large_block) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(kBytes);
  for (std::size_t i = 0; i < kBytes; ++i) mine[i] = static_cast<char>(i * 7 + i / 4096);
  Target target(theirs);
  Side side("initiator");
  Link link(*side.backend, target.address, target.key, region_of(mine.data(), kBytes), region_of(theirs, kBytes));
  Plan plan = link.plan(Op::kWrite);
  add_block(plan, at(mine.data()), at(theirs), 1000);
  plan.count = {4000};
  plan.local_stride = {2000};
  plan.remote_stride = {3000};
  plan.num_blocks = 4000;
  plan.total_bytes = 4'000'000;
  CHECK_OK(run(**CHECK_OK(side.backend->prepare(std::move(plan)))));
  for (std::size_t b = 0; b < 4000; ++b) {
    CHECK(!std::memcmp(mine.data() + b * 2000, theirs + b * 3000, 1000));
    CHECK(theirs[b * 3000 + 1000] == 0 && theirs[b * 3000 + 2999] == 0);
  }
  plan = link.plan(Op::kWrite);
  add_block(plan, at(mine.data()), at(theirs), kBytes);
  CHECK_OK(run(**CHECK_OK(side.backend->prepare(std::move(plan)))));
  CHECK(!std::memcmp(mine.data(), theirs, kBytes));
}

TEST(messages_keep_order_and_size) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(4096, 'x');
  Target target(theirs);
  Side side("initiator");
  Link link(*side.backend, target.address, target.key, region_of(mine.data(), 4096), region_of(theirs, kBytes));
  Notifier& notifier = *side.backend->notifier();
  Plan plan = link.plan(Op::kWrite);
  add_block(plan, at(mine.data()), at(theirs), 4096);
  auto transfer = std::move(*CHECK_OK(side.backend->prepare(std::move(plan))));
  CHECK_OK(run(*transfer, "after the data"));
  CHECK_EQ(target.ask('n'), std::string("initiator:after the data\n"));
  CHECK_EQ(theirs[4095], 'x');
  CHECK_OK(run(*transfer));  // no message: none arrives between this and the next one
  CHECK_OK(notifier.send(*link.peer, std::string_view("\0z", 2)));
  CHECK_EQ(target.ask('n'), std::string("initiator:") + std::string("\0z", 2) + "\n");
  CHECK_OK(notifier.send(*link.peer, ""));
  CHECK_EQ(target.ask('n'), std::string("initiator:\n"));
  // More than the lane holds while the receiver does not look: queued here, delivered whole and in order.
  std::string big(1 << 20, 'b');
  for (int i = 0; i < 3000; ++i) CHECK_OK(notifier.send(*link.peer, std::to_string(i)));
  CHECK_OK(notifier.send(*link.peer, big));
  std::string got;
  while (got.size() < 3000 || got.find(big) == std::string::npos) {
    target.tell('n');
    pollfd answer{target.fd, POLLIN, 0};
    while (::poll(&answer, 1, 0) == 0) side.backend->progress();
    got += read_text(target.fd);
  }
  std::string wanted;
  for (int i = 0; i < 3000; ++i) wanted += "initiator:" + std::to_string(i) + "\n";
  CHECK(got == wanted + "initiator:" + big + "\n");
}

TEST(a_sleeping_receiver_is_woken) {
  char* const theirs = shared_bytes();
  Target target(theirs);
  Side side("initiator");
  auto peer = std::move(*CHECK_OK(side.backend->connect({"target", 7}, target.address)));
  for (int i = 0; i < 200; ++i) {
    target.tell('e');
    if (i % 2) ::usleep(i * 10);  // before and after it has fallen asleep
    CHECK_OK(side.backend->notifier()->send(*peer, "wake " + std::to_string(i)));
    pollfd answer{target.fd, POLLIN, 0};
    CHECK_EQ(::poll(&answer, 1, 5000), 1);
    CHECK_EQ(read_text(target.fd), "wake " + std::to_string(i));
  }
}

TEST(a_killed_peer_is_an_error_and_is_told_once) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(kBytes, 'k');
  for (int round = 0; round < 4; ++round) {
    const bool inside = round % 2;
    const std::size_t bytes = round < 2 ? kBytes : 64;  // many calls; a single small copy
    Target target(theirs);
    Side side("initiator");
    Link link(*side.backend, target.address, target.key, region_of(mine.data(), kBytes), region_of(theirs, kBytes));
    Plan plan = link.plan(Op::kWrite);
    if (bytes == 64) add_block(plan, at(mine.data()), at(theirs), bytes);
    for (std::size_t i = 0; i + 4096 <= bytes; i += 4096) add_block(plan, at(mine.data() + i), at(theirs + i), 4096);
    auto transfer = std::move(*CHECK_OK(side.backend->prepare(std::move(plan))));
    CHECK_OK(run(*transfer));
    if (!inside) target.end();
    Result<void> result;
    for (int i = 0; i < 2'000'000 && result; ++i) {
      if (inside && i == 3) ::kill(target.pid, SIGKILL);
      result = run(*transfer);
    }
    CHECK(!result);
    CHECK(result.error().code == Code::kPeerLost);
    const Nanoseconds limit = now_ns() + 2'000'000'000;
    while (side.lost.count == 0 && now_ns() < limit) side.backend->progress();
    for (int i = 0; i < 100; ++i) side.backend->progress();
    CHECK_EQ(side.lost.count.load(), 1);
    CHECK(run(*transfer).error().code == Code::kPeerLost);
    CHECK(side.backend->notifier()->send(*link.peer, "x").error().code == Code::kPeerLost);
    // An idle initiator is told as well: nothing keeps the descriptor busy afterwards.
    CHECK(side.backend->arm());
    pollfd wait{side.backend->event_fd(), POLLIN, 0};
    CHECK_EQ(::poll(&wait, 1, 20), 0);
  }
}

TEST(a_stopped_peer_does_not_hold_up_copies) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(kBytes, 's');
  Target target(theirs);
  Side side("initiator");
  Link link(*side.backend, target.address, target.key, region_of(mine.data(), kBytes), region_of(theirs, kBytes));
  ::kill(target.pid, SIGSTOP);
  Plan plan = link.plan(Op::kWrite);
  add_block(plan, at(mine.data()), at(theirs), kBytes);
  CHECK_OK(run(**CHECK_OK(side.backend->prepare(std::move(plan))), "stopped"));
  CHECK(!std::memcmp(mine.data(), theirs, kBytes));
  ::kill(target.pid, SIGCONT);
  CHECK_EQ(target.ask('n'), std::string("initiator:stopped\n"));
}

TEST(deregistered_and_freed_memory_is_refused) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(kBytes, 'r');
  for (const auto& [how, bytes] :
       {std::pair{'d', kBytes}, {'u', kBytes}, {'d', std::size_t{64}}, {'u', std::size_t{64}}}) {
    std::memset(theirs, 0, kBytes);
    Target target(theirs);
    Side side("initiator");
    Link link(*side.backend, target.address, target.key, region_of(mine.data(), kBytes), region_of(theirs, kBytes));
    Plan plan = link.plan(Op::kWrite);
    add_block(plan, at(mine.data()), at(theirs), bytes);
    auto transfer = std::move(*CHECK_OK(side.backend->prepare(std::move(plan))));
    CHECK_OK(run(*transfer));
    std::memset(theirs, 0, kBytes);
    target.ask(how);
    const auto result = run(*transfer, "never");
    CHECK(!result);
    CHECK(result.error().code == (how == 'd' ? Code::kNotFound : Code::kIo));
    CHECK_EQ(theirs[0], 0);
    CHECK_OK(side.backend->notifier()->send(*link.peer, "next"));
    CHECK_EQ(target.ask('n'), std::string("initiator:next\n"));
    CHECK_EQ(side.lost.count.load(), 0);
  }
}

TEST(cancel_ends_and_sends_nothing) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(kBytes, 'c');
  Target target(theirs);
  Side side("initiator");
  Link link(*side.backend, target.address, target.key, region_of(mine.data(), kBytes), region_of(theirs, kBytes));
  Plan plan = link.plan(Op::kWrite);
  add_block(plan, at(mine.data()), at(theirs), kBytes);
  auto transfer = std::move(*CHECK_OK(side.backend->prepare(std::move(plan))));
  int cancelled = 0;
  for (int i = 0; i < 50; ++i) {
    CHECK_OK(transfer->submit("message"));
    while (!transfer->cancel()) {
    }
    const auto state = transfer->poll();
    CHECK(state || state.error().code == Code::kCancelled);
    if (!state) ++cancelled;
    std::memset(theirs, 0, 4096);
    ::usleep(100);
    CHECK(state || theirs[0] == 0);
  }
  CHECK(cancelled > 0);
  CHECK_OK(side.backend->notifier()->send(*link.peer, "end"));
  const std::string got = target.ask('n');
  CHECK_EQ(static_cast<int>(std::count(got.begin(), got.end(), '\n')), 50 - cancelled + 1);
}

TEST(a_thousand_peers_leave_nothing_behind) {
  char* const theirs = shared_bytes();
  Side side("initiator");
  Target target(theirs);
  std::size_t fds = 0;
  for (int i = 0; i < 1000; ++i) {
    auto peer = std::move(*CHECK_OK(side.backend->connect({"target", 7}, target.address)));
    CHECK_OK(side.backend->notifier()->send(*peer, "hello"));
    if (i == 10) fds = open_fds();
    if (i == 999) CHECK_EQ(open_fds(), fds);
    if (i % 100 == 99) target.ask('n');  // frees the lanes that were left
  }
  CHECK(open_fds() < fds);
}

TEST(wrong_addresses_are_refused) {
  Side side("initiator"), other("target");
  const std::string address = *CHECK_OK(other.backend->export_connection());
  const auto code = [&](const std::string& bytes) { return side.backend->connect({"target", 7}, bytes).error().code; };
  for (std::size_t cut = 0; cut < address.size(); ++cut) CHECK(code(address.substr(0, cut)) == Code::kMismatch);
  std::string elsewhere = address;
  elsewhere[10] ^= 1;  // inside the host identity
  CHECK(code(elsewhere) == Code::kUnsupported);
  // The announced incarnation is the eight bytes before the doorbell's length.
  ByteReader in(address);
  CHECK_OK(in.get<std::uint32_t>());
  CHECK_OK(in.get_text(4096));
  std::string recycled = address;
  recycled[in.offset() + 16] ^= 1;
  CHECK(code(recycled) == Code::kPeerLost);
}

TEST(another_user_is_refused_with_the_rule) {
  if (::getuid() != 0) return;  // only root can start processes of two users
  Target target(shared_bytes(), kBytes, 4321);
  const pid_t pid = ::fork();
  if (pid == 0) {
    CHECK_EQ(::setuid(4322), 0);
    Side side("initiator");
    const auto refused = side.backend->connect({"target", 7}, target.address);
    CHECK(!refused && refused.error().code == Code::kUnsupported);
    CHECK(refused.error().reason.find("the kernel forbids") != std::string::npos);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  CHECK_EQ(status, 0);
}

TEST(a_forked_child_takes_nothing_from_its_parent) {
  char* const theirs = shared_bytes();
  std::vector<char> mine(4096, 'f');
  Target target(theirs);
  Side side("initiator"), watcher("watcher");
  auto region = std::move(*CHECK_OK(side.backend->add_region(region_of(mine.data(), 4096))));
  const std::string key = *CHECK_OK(side.backend->export_region(*region));
  auto link = std::make_unique<Link>(*side.backend, target.address, target.key, region_of(mine.data(), 4096),
                                     region_of(theirs, kBytes));
  CHECK_OK(side.backend->notifier()->send(*link->peer, "before"));
  CHECK_EQ(target.ask('n'), std::string("initiator:before\n"));
  const pid_t pid = ::fork();
  if (pid == 0) {
    link.reset();
    region.reset();
    side.backend.reset();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  CHECK_EQ(status, 0);
  CHECK_OK(side.backend->notifier()->send(*link->peer, "after"));
  CHECK_EQ(target.ask('n'), std::string("initiator:after\n"));
  CHECK_OK(side.backend->notifier()->send(*link->peer, "and once more"));
  CHECK_EQ(target.ask('n'), std::string("initiator:and once more\n"));
  Link back(*watcher.backend, *CHECK_OK(side.backend->export_connection()), key, region_of(theirs, 4096),
            region_of(mine.data(), 4096));
  Plan plan = back.plan(Op::kRead);
  add_block(plan, at(theirs), at(mine.data()), 4096);
  CHECK_OK(run(**CHECK_OK(watcher.backend->prepare(std::move(plan)))));
  CHECK_EQ(theirs[4095], 'f');
}

TEST(two_backends_in_one_process) {
  std::vector<char> mine(kBytes, 'p'), theirs(kBytes);
  Side side("initiator"), other("target");
  auto region = std::move(*CHECK_OK(other.backend->add_region(region_of(theirs.data(), kBytes))));
  Link link(*side.backend, *CHECK_OK(other.backend->export_connection()),
            *CHECK_OK(other.backend->export_region(*region)), region_of(mine.data(), kBytes),
            region_of(theirs.data(), kBytes));
  Plan plan = link.plan(Op::kWrite);
  add_block(plan, at(mine.data()), at(theirs.data()), kBytes);
  CHECK_OK(run(**CHECK_OK(side.backend->prepare(std::move(plan))), "m"));
  CHECK(mine == theirs);
  std::vector<Notification> got;
  other.backend->notifier()->drain(got);
  CHECK_EQ(got.size(), 1u);
  CHECK_EQ(got[0].sender + got[0].message, std::string("initiatorm"));
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
