// Registered memory becomes huge when a peer of this host is there, and only then; contents stay, whatever else happens
// to the memory meanwhile.
#include "backends/samehost/huge_pages.h"

#include <poll.h>
#include <sys/mman.h>

#include <atomic>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include "backends/samehost/test_process.h"
#include "base/env.h"

using namespace nixl::core;

namespace {

constexpr std::size_t kHuge = 2 << 20, kBytes = 32 << 20;

// Private memory that begins on a huge page, as malloc and torch have it; unmapped at the end.
struct Memory {
  explicit Memory(std::size_t touched = kBytes) {
    base = ::mmap(nullptr, kBytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(base != MAP_FAILED);
    bytes = reinterpret_cast<char*>((reinterpret_cast<std::uint64_t>(base) + kHuge - 1) / kHuge * kHuge);
    for (std::size_t i = 0; i < touched; ++i) bytes[i] = value(i);
  }
  ~Memory() { ::munmap(base, kBytes + kHuge); }
  static char value(std::size_t i) { return static_cast<char>(i * 7 + i / 4096); }
  Region region() const { return {MemKind::kDram, reinterpret_cast<std::uint64_t>(bytes), kBytes, 0, ""}; }

  // A field of this memory in smaps, in bytes; summed over its mappings.
  std::size_t field(const std::string& name) const {
    std::ifstream file("/proc/self/smaps");
    const auto from = reinterpret_cast<std::uint64_t>(bytes), to = from + kBytes;
    std::size_t total = 0;
    bool ours = false;
    for (std::string line; std::getline(file, line);) {
      unsigned long long begin, end;
      if (std::sscanf(line.c_str(), "%llx-%llx ", &begin, &end) == 2 && line.find(':') > line.find(' '))
        ours = begin < to && end > from;
      else if (ours && line.rfind(name + ":", 0) == 0)
        total += std::strtoull(line.c_str() + name.size() + 1, nullptr, 10) * 1024;
    }
    return total;
  }
  std::size_t huge() const { return field("AnonHugePages"); }

  void* base;
  char* bytes;
};

struct Agent {
  explicit Agent(const char* name, const std::string& wanted = "") {
    BackendConfig config;
    config.self = {name, 1};
    config.params[samehost::HugePages::kParam] = wanted;
    backend = std::move(*CHECK_OK(backends_of_samehost()[0].open(std::move(config))));
    // As every agent does.
    self = std::move(*CHECK_OK(backend->connect({name, 1}, *CHECK_OK(backend->export_connection()))));
  }
  std::unique_ptr<Connection> to(Agent& other) {
    return std::move(*CHECK_OK(backend->connect({"other", 1}, *CHECK_OK(other.backend->export_connection()))));
  }
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Connection> self;
};

// Progress of the owner until `done`, or for a second where nothing shall happen.
template <typename Done>
bool within(Agent& owner, Nanoseconds limit, Done done) {
  const Deadline deadline = Deadline::after(limit);
  while (!done()) {
    if (deadline.passed()) return false;
    owner.backend->progress();
    ::usleep(2000);
  }
  return true;
}
constexpr Nanoseconds kSoon = 20'000'000'000, kWhile = 700'000'000;

bool available() {
  if (*CHECK_OK(samehost::HugePages::open({}))) return true;
  std::fprintf(stderr,
               "        not tested: this system has no transparent huge pages (NIXL_LOG_LEVEL=DEBUG says why)\n");
  return false;
}

}  // namespace

TEST(a_peer_makes_registered_memory_huge) {
  if (!available()) return;
  Memory memory, near;
  Agent owner("owner"), peer("peer");
  auto region = std::move(*CHECK_OK(owner.backend->add_region(memory.region())));
  auto near_region = std::move(*CHECK_OK(peer.backend->add_region(near.region())));
  CHECK(!within(owner, kWhile, [&] { return memory.huge() + near.huge() > 0; }));  // alone: nothing is touched
  const auto link = peer.to(owner);
  // The owner goes on writing.
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    while (!stop)
      for (std::size_t i = 0; i < kBytes; i += 1000) {
        volatile char& byte = memory.bytes[i];
        byte = Memory::value(i);
      }
  });
  const bool became = within(owner, kSoon, [&] { return memory.huge() + near.huge() == 2 * kBytes; });
  stop = true;
  writer.join();
  CHECK(became);
  for (std::size_t i = 0; i < kBytes; ++i) CHECK_EQ(memory.bytes[i], Memory::value(i));
  // Later regions follow without being asked.
  Memory second;
  auto also = std::move(*CHECK_OK(owner.backend->add_region(second.region())));
  CHECK(within(owner, kSoon, [&] { return second.huge() == kBytes; }));
}

TEST(a_sleeping_owner_is_told) {
  if (!available()) return;
  Agent owner("owner"), peer("peer");
  while (!owner.backend->arm()) owner.backend->progress();
  const auto link = peer.to(owner);
  pollfd bell{owner.backend->event_fd(), POLLIN, 0};
  CHECK_EQ(::poll(&bell, 1, 5000), 1);
}

TEST(untouched_memory_is_not_filled) {
  if (!available()) return;
  Memory memory(kBytes / 2 + 3 * kHuge / 4);
  Agent owner("owner"), peer("peer");
  auto region = std::move(*CHECK_OK(owner.backend->add_region(memory.region())));
  const auto link = peer.to(owner);
  CHECK(within(owner, kSoon, [&] { return memory.huge() >= kBytes / 2; }));
  within(owner, kWhile, [&] { return memory.field("Rss") > kBytes / 2 + kHuge; });
  CHECK_EQ(memory.field("Rss"), kBytes / 2 + 3 * kHuge / 4);
  // What is touched from now on is huge at once.
  memory.bytes[kBytes - 1] = 1;
  CHECK_EQ(memory.huge(), kBytes / 2 + kHuge);
}

TEST(memory_may_go_at_any_time) {
  if (!available()) return;
  Agent owner("owner"), peer("peer");
  const auto link = peer.to(owner);
  owner.backend->progress();
  for (int i = 0; i < 40; ++i) {
    auto memory = std::make_unique<Memory>();
    auto region = std::move(*CHECK_OK(owner.backend->add_region(memory->region())));
    ::usleep(static_cast<useconds_t>(i * 700));
    if (i % 2) region.reset();
    if (i % 3) ::madvise(memory->bytes, kBytes / 2, MADV_DONTNEED);  // others hold zeros from here on
    if (i % 3 == 0)
      for (std::size_t at = 0; at < kBytes; at += 511) CHECK_EQ(memory->bytes[at], Memory::value(at));
    memory.reset();
  }
}

TEST(switched_off_by_parameter_and_environment) {
  Memory memory;
  Agent off("off", "false"), peer("peer");
  auto region = std::move(*CHECK_OK(off.backend->add_region(memory.region())));
  const auto link = peer.to(off);
  CHECK(!within(off, kWhile, [&] { return memory.huge() > 0; }));
  ::setenv(samehost::HugePages::kEnv, "n", 1);
  CHECK(*CHECK_OK(samehost::HugePages::open({{samehost::HugePages::kParam, "true"}})) == nullptr);
  ::unsetenv(samehost::HugePages::kEnv);
  const auto wrong = samehost::HugePages::open({{samehost::HugePages::kParam, "perhaps"}});
  CHECK(!wrong && wrong.error().code == Code::kInvalidArgument);
}

TEST(a_forked_child_ends_while_the_thread_works) {
  if (!available()) return;
  for (int i = 0; i < 10; ++i) {
    Memory memory;
    Agent owner("owner"), peer("peer");
    auto region = std::move(*CHECK_OK(owner.backend->add_region(memory.region())));
    const auto link = peer.to(owner);
    owner.backend->progress();
    ::usleep(static_cast<useconds_t>(i * 500));
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::alarm(20);
      region.reset();
      owner.self.reset();
      owner.backend.reset();
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(pid, &status, 0);
    CHECK_EQ(status, 0);
  }
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
