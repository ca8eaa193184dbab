// Transfers with a second process whose memory is a memory file: mapped where the file cannot shrink, copied elsewhere.
#include "backends/samehost/shared_memory.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "contract/entry.h"

using namespace nixl::core;

namespace nixl::core {
std::span<const BackendEntry> backends_of_samehost();
}

namespace {

constexpr std::size_t kBytes = 8 << 20;
constexpr std::size_t kAt = 4096 * 3 + 40;  // of the region in its file: off every page

std::unique_ptr<Backend> open_backend(const char* name) {
  BackendConfig config;
  config.self = {name, 1};
  return std::move(*CHECK_OK(backends_of_samehost()[0].open(std::move(config))));
}

std::uint64_t at(const void* p) {
  return reinterpret_cast<std::uint64_t>(p);
}

void send_text(int fd, const std::string& text) {
  const auto size = static_cast<std::uint32_t>(text.size());
  CHECK_EQ(::write(fd, &size, 4), 4);
  CHECK_EQ(::write(fd, text.data(), size), static_cast<ssize_t>(size));
}
std::string read_text(int fd) {
  std::uint32_t size;
  CHECK_EQ(::recv(fd, &size, 4, MSG_WAITALL), 4);
  std::string text(size, 0);
  if (size) CHECK_EQ(::recv(fd, text.data(), size, MSG_WAITALL), static_cast<ssize_t>(size));
  return text;
}

// A process that registers kBytes at kAt of a memory file, and deregisters them when told to. The file is ours too.
struct Target {
  explicit Target(int seals, const char* policy = nullptr)
      : file(::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING)) {
    CHECK_EQ(::ftruncate(file, kAt + kBytes + 4096), 0);
    CHECK_EQ(::fcntl(file, F_ADD_SEALS, seals), 0);
    memory =
        static_cast<char*>(::mmap(nullptr, kAt + kBytes + 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)) + kAt;
    int ends[2];
    CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    pid = ::fork();
    if (pid == 0) {
      ::alarm(60);
      if (policy) ::setenv("NIXL_SAME_HOST_MAP", policy, 1);
      auto backend = open_backend("target");
      auto region = std::move(*CHECK_OK(backend->add_region({MemKind::kDram, at(memory), kBytes, 0, ""})));
      send_text(ends[1], *CHECK_OK(backend->export_connection()));
      send_text(ends[1], *CHECK_OK(backend->export_region(*region)));
      ::close(ends[0]);
      char word;
      while (::read(ends[1], &word, 1) == 1) {
        region.reset();
        send_text(ends[1], "gone");
      }
      ::_exit(0);
    }
    ::close(ends[1]);
    fd = ends[0];
    address = read_text(fd);
    key = read_text(fd);
  }
  ~Target() {
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    ::close(fd);
    ::close(file);
    ::munmap(memory - kAt, kAt + kBytes + 4096);
  }
  int file, fd;
  char* memory;
  pid_t pid;
  std::string address, key;
};

struct Link {
  Link(Target& target, char* mine) : backend(open_backend("initiator")) {
    ours = std::move(*CHECK_OK(backend->add_region({MemKind::kDram, at(mine), kBytes, 0, ""})));
    peer = std::move(*CHECK_OK(backend->connect({"target", 1}, target.address)));
    theirs = std::move(
        *CHECK_OK(backend->import_region(*peer, {MemKind::kDram, at(target.memory), kBytes, 0, ""}, target.key)));
  }
  // Pieces of odd sizes, backwards on the far side.
  std::unique_ptr<Transfer> transfer(Op op, char* mine, char* far) {
    Plan plan;
    plan.op = op;
    plan.peer = peer.get();
    plan.local_regions = {ours.get()};
    plan.remote_regions = {theirs.get()};
    std::size_t piece = 1;
    for (std::size_t done = 0; done < kBytes;
         done += piece, piece = std::min((piece * 7 + 3) % 300'007, kBytes - done)) {
      plan.local_address.push_back(at(mine) + done);
      plan.remote_address.push_back(at(far) + kBytes - done - piece);
      plan.length.push_back(piece);
      plan.local_region.push_back(0);
      plan.remote_region.push_back(0);
      ++plan.num_blocks;
      plan.total_bytes += piece;
    }
    return std::move(*CHECK_OK(backend->prepare(std::move(plan))));
  }
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LocalRegion> ours;
  std::unique_ptr<Connection> peer;
  std::unique_ptr<RemoteRegion> theirs;
};

Result<void> run(Transfer& transfer) {
  NIXL_ASSIGN(TransferState state, transfer.submit("done"));
  while (state == TransferState::kRunning) {
    NIXL_ASSIGN(state, transfer.poll());
  }
  return {};
}

void fill(char* memory, unsigned seed) {
  for (std::size_t i = 0; i < kBytes; ++i) memory[i] = static_cast<char>((i * 2654435761u >> 7) + seed);
}

// Does this kernel tell which file an address is of?
bool can_ask() {
  const int file = ::memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  CHECK_EQ(::ftruncate(file, 4096), 0);
  CHECK_EQ(::fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK), 0);
  void* const page = ::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  const bool can = CHECK_OK(samehost::SharedMemory::open())->find({MemKind::kDram, at(page), 4096, 0, ""}).has_value();
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
    Link link(target, mine.data());
    for (const Op op : {Op::kWrite, Op::kRead}) {
      fill(mine.data(), 1);
      fill(target.memory, 2);
      auto transfer = link.transfer(op, mine.data(), target.memory);
      CHECK_EQ(transfer->path(), std::string(can_ask() ? path : "cma"));
      std::vector<char> source(op == Op::kWrite ? mine.data() : target.memory,
                               (op == Op::kWrite ? mine.data() : target.memory) + kBytes);
      CHECK_OK(run(*transfer));
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
  Link link(target, mine.data());
  auto transfer = link.transfer(Op::kWrite, mine.data(), target.memory);
  CHECK_OK(run(*transfer));
  CHECK_EQ(::write(target.fd, "d", 1), 1);
  CHECK_EQ(read_text(target.fd), std::string("gone"));
  CHECK(run(*transfer).error().code == Code::kNotFound);
  ::kill(target.pid, SIGKILL);
  ::waitpid(target.pid, nullptr, 0);
  ::usleep(1000);
  CHECK(run(*transfer).error().code == Code::kPeerLost);
}

TEST(private_memory_is_no_file) {
  const auto memory = CHECK_OK(samehost::SharedMemory::open());
  std::vector<char> mine(kBytes);
  CHECK(!memory->find({MemKind::kDram, at(mine.data()), kBytes, 0, ""}));
  CHECK(!memory->find({MemKind::kDram, 4096, 4096, 0, ""}));
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
