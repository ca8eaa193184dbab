// Transfers with a second process whose memory is a memory file: mapped where the file cannot shrink, copied elsewhere.
#include "backends/samehost/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "backends/samehost/connection.h"
#include "backends/samehost/test_process.h"
#include "backends/samehost/transfer.h"

using namespace nixl::core;
using namespace nixl::core::samehost::test;

namespace {

constexpr std::size_t kBytes = 8 << 20;
constexpr std::size_t kAt = 4096 * 3 + 40;  // of the region in its file: off every page
constexpr std::size_t kFileBytes = kAt + kBytes + 4096;

// A memory file of both processes, with kBytes at kAt as the region.
struct File {
  explicit File(int seals) : fd(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    CHECK_EQ(::ftruncate(fd, kFileBytes), 0);
    CHECK_EQ(::fcntl(fd, F_ADD_SEALS, seals), 0);
    memory = static_cast<char*>(::mmap(nullptr, kFileBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) + kAt;
  }
  ~File() {
    ::close(fd);
    ::munmap(memory - kAt, kFileBytes);
  }
  File(const File&) = delete;
  int fd;
  char* memory;
};

// A process that registers the region of a file, and deregisters it when told to.
struct Target : File, TargetProcess {
  explicit Target(int seals, const char* policy = nullptr)
      : File(seals), TargetProcess([&](int fd) { serve(fd, memory, policy); }) {}
  static void serve(int fd, char* memory, const char* policy) {
    if (policy) ::setenv("NIXL_SAME_HOST_MAP", policy, 1);
    auto backend = open_backend("target");
    auto region = std::move(*CHECK_OK(backend->add_region(region_of(memory, kBytes))));
    send_address_and_key(fd, *backend, *region);
    for (char word; ::read(fd, &word, 1) == 1;) {
      region.reset();
      send_text(fd, "gone");
    }
  }
};

struct Initiator {
  Initiator(Target& target, char* mine)
      : backend(open_backend("initiator")),
        link(*backend, target.address, target.key, region_of(mine, kBytes), region_of(target.memory, kBytes)) {}
  // Pieces of odd sizes, backwards on the far side.
  std::unique_ptr<Transfer> transfer(Op op, char* mine, char* far) {
    Plan plan = link.plan(op);
    std::size_t piece = 1;
    for (std::size_t done = 0; done < kBytes; done += piece, piece = std::min((piece * 7 + 3) % 300'007, kBytes - done))
      add_block(plan, at(mine) + done, at(far) + kBytes - done - piece, piece);
    return std::move(*CHECK_OK(backend->prepare(std::move(plan))));
  }
  std::unique_ptr<Backend> backend;
  const Link link;
};

void fill(char* memory, unsigned seed) {
  for (std::size_t i = 0; i < kBytes; ++i) memory[i] = static_cast<char>((i * 2654435761u >> 7) + seed);
}

// Does this kernel tell which file an address is of?
bool can_ask() {
  const int file = ::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK_EQ(::ftruncate(file, 4096), 0);
  CHECK_EQ(::fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK), 0);
  void* const page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  const bool can = CHECK_OK(samehost::SharedMemory::open())->find(region_of(page, 4096)).has_value();
  ::munmap(page, 4096);
  ::close(file);
  return can;
}

TEST(a_file_that_cannot_shrink_is_mapped) {
  for (const auto& [seals, policy, path] : {std::tuple{F_SEAL_SHRINK, static_cast<const char*>(nullptr), "shm"},
                                            {F_SEAL_GROW, nullptr, "cma"},
                                            {F_SEAL_SHRINK, "n", "cma"}}) {
    Target target(seals, policy);
    std::vector<char> mine(kBytes), before(kBytes);
    Initiator side(target, mine.data());
    for (const Op op : {Op::kWrite, Op::kRead}) {
      fill(mine.data(), 1);
      fill(target.memory, 2);
      auto transfer = side.transfer(op, mine.data(), target.memory);
      CHECK_EQ(transfer->path(), std::string(can_ask() ? path : "cma"));
      std::vector<char> source(op == Op::kWrite ? mine.data() : target.memory,
                               (op == Op::kWrite ? mine.data() : target.memory) + kBytes);
      CHECK_OK(run(*transfer, "done"));
      // What was moved, moved back by hand from its reversed places.
      std::size_t piece = 1;
      for (std::size_t done = 0; done < kBytes;
           done += piece, piece = std::min((piece * 7 + 3) % 300'007, kBytes - done)) {
        const char *near = mine.data() + done, *far = target.memory + kBytes - done - piece;
        CHECK(!std::memcmp(near, far, piece));
        CHECK(!std::memcmp(op == Op::kWrite ? near : far,
                           source.data() + (op == Op::kWrite ? done : kBytes - done - piece), piece));
      }
    }
    // Bytes beside the region stay as they were.
    CHECK_EQ(target.memory[-1], 0);
    CHECK_EQ(target.memory[kBytes], 0);
  }
}

TEST(memory_that_was_given_back_and_dead_peers_are_refused) {
  Target target(F_SEAL_SHRINK);
  std::vector<char> mine(kBytes, 'm');
  Initiator side(target, mine.data());
  auto transfer = side.transfer(Op::kWrite, mine.data(), target.memory);
  CHECK_OK(run(*transfer, "done"));
  CHECK_EQ(target.ask('d'), std::string("gone"));
  CHECK(run(*transfer, "done").error().code == Code::kNotFound);
  target.end();
  ::usleep(1000);
  CHECK(run(*transfer, "done").error().code == Code::kPeerLost);
}

// As a GPU driver does, which holds the pages by their addresses.
struct WatchedLock final : samehost::PageLock {
  WatchedLock(const char* memory, bool& let_go) : memory(memory), let_go(let_go) {}
  ~WatchedLock() override { let_go = memory[0] == 'f'; }
  const char* memory;
  bool& let_go;
};

TEST(pages_are_let_go_before_they_are_unmapped) {
  if (!can_ask()) SKIP("this kernel does not tell which file memory is (Linux 6.11)");
  Target target(F_SEAL_SHRINK);
  std::memset(target.memory, 'f', kBytes);
  std::vector<char> mine(kBytes);
  const auto backend = open_backend("initiator");
  Link link(*backend, target.address, target.key, region_of(mine.data(), kBytes), region_of(target.memory, kBytes));
  samehost::SharedMapping* const shared = static_cast<samehost::FarRegion*>(link.theirs.get())->shared();
  CHECK_EQ(at(target.memory) + shared->delta(), at(shared->base()) + kAt % 4096);
  CHECK_EQ(shared->bytes(), kAt % 4096 + kBytes);
  bool let_go = false;
  shared->lock = std::make_unique<WatchedLock>(shared->base() + kAt % 4096, let_go);
  link.theirs.reset();
  CHECK(let_go);
}

TEST(holes_in_own_memory_are_seen) {
  constexpr std::size_t kPage = 4096;
  char* const memory =
      static_cast<char*>(::mmap(nullptr, 8 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  const std::uint64_t start = at(memory) + 17;
  CHECK_OK(samehost::check_mapped(start, 8 * kPage - 17));
  CHECK_EQ(::munmap(memory + 4 * kPage, kPage), 0);
  CHECK_OK(samehost::check_mapped(start, 4 * kPage - 17));
  CHECK_OK(samehost::check_mapped(at(memory) + 5 * kPage, 3 * kPage));
  for (const std::size_t bytes : {4 * kPage - 16, 8 * kPage - 17})
    CHECK(samehost::check_mapped(start, bytes).error().code == Code::kIo);
  ::munmap(memory, 4 * kPage), ::munmap(memory + 5 * kPage, 3 * kPage);
  CHECK(samehost::check_mapped(at(memory), 1).error().code == Code::kIo);
}

TEST(private_memory_is_no_file) {
  const auto memory = CHECK_OK(samehost::SharedMemory::open());
  std::vector<char> mine(kBytes);
  CHECK(!memory->find(region_of(mine.data(), kBytes)));
  CHECK(!memory->find({MemKind::kDram, 4096, 4096, 0, ""}));
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
