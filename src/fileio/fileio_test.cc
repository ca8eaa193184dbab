// Files, queues and the engine on a real file system. Every engine runs the same list; faults come from the kernel
// where it can be made to fail here (full tmpfs, read-only descriptor, truncated file), else from a queue that answers
// for it.
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <map>
#include <random>

#include "base/clock.h"
#include "check.h"
#include "fileio/engine.h"
#include "fileio/request.h"

using namespace nixl::core;
using namespace nixl::core::fileio;

namespace {

constexpr Nanoseconds kLimit = 20'000'000'000;

struct TempFolder {
  TempFolder() {
    char text[] = "/tmp/nixl_fileio_XXXXXX";
    CHECK(::mkdtemp(text) != nullptr);
    path = text;
  }
  ~TempFolder() { (void)!std::system(("rm -rf " + path).c_str()); }
  std::string path;
};

std::vector<std::byte> pattern(std::size_t size, unsigned seed) {
  std::vector<std::byte> bytes(size);
  std::mt19937_64 random(seed);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

std::unique_ptr<File> open_file(const std::string& text) {
  auto mode = CHECK_OK(parse_path_mode(text));
  CHECK(mode->has_value());
  return std::move(*CHECK_OK(File::open(**mode)));
}

Engine::State finish(Engine& engine, Request& request) {
  const Deadline deadline = Deadline::after(kLimit);
  Engine::State state = engine.poll(request);
  while (state == Engine::State::kRunning) {
    CHECK(!deadline.passed());
    state = engine.poll(request);
  }
  return state;
}
Engine::State run(Engine& engine, Request& request) {
  const auto state = CHECK_OK(engine.start(request));
  return *state == Engine::State::kRunning ? finish(engine, request) : *state;
}

const std::map<const char*, EngineKind> kKinds = {{"automatic", EngineKind::kAutomatic},
                                                  {"io_uring", EngineKind::kUring},
                                                  {"libaio", EngineKind::kLinuxAio},
                                                  {"posix_aio", EngineKind::kPosixAio}};

template <typename F>
void each_engine(F body) {
  for (const auto& [name, kind] : kKinds) {
    EngineConfig config;
    config.kind = kind;
    auto engine = Engine::open(config);
    if (!engine && engine.error().code == Code::kUnsupported) {
      std::fprintf(stderr, "  not run: %s\n", engine.error().reason.c_str());
      continue;
    }
    if (!engine) check::failed(__FILE__, __LINE__, engine.error().reason);
    body(**engine, name);
  }
}

// Answers for the kernel: the nth Io (from 0, over the queue's life) gets the result given, or is cut short.
class FaultyQueue final : public Queue {
 public:
  explicit FaultyQueue(std::unique_ptr<Queue> real) : real_(std::move(real)) {}
  std::string_view name() const noexcept override { return "faulty"; }
  std::uint32_t depth() const noexcept override { return real_->depth(); }
  std::uint32_t max_iov() const noexcept override { return 1; }
  Result<std::size_t> submit(std::span<const Io> batch) override {
    for (const Io& io : batch) {
      const auto plan = plans.find(count_++);
      if (plan != plans.end() && plan->second < 0) {
        answers_.push_back({io.slot, plan->second});
        continue;
      }
      Io copy = io;
      iovec part = *io.iov;
      if (plan != plans.end()) {
        part.iov_len = static_cast<std::size_t>(plan->second);
        copy.iov = &part;
      }
      CHECK_EQ(*CHECK_OK(real_->submit({&copy, 1})), std::size_t{1});
    }
    return batch.size();
  }
  std::size_t reap(std::span<Done> out) override {
    if (hold) return 0;
    std::size_t n = 0;
    for (; n < out.size() && !answers_.empty(); answers_.pop_back()) out[n++] = answers_.back();
    return n + real_->reap(out.subspan(n));
  }
  void cancel(std::uint32_t slot) noexcept override { real_->cancel(slot); }

  std::map<int, std::int64_t> plans;
  bool hold = false;

 private:
  std::unique_ptr<Queue> real_;
  std::vector<Done> answers_;
  int count_ = 0;
};

struct FaultyEngine {
  FaultyEngine() {
    auto faulty = std::make_unique<FaultyQueue>(std::move(*CHECK_OK(open_linux_aio(64))));
    queue = faulty.get();
    engine = Engine::with_queues(std::move(faulty), std::move(*CHECK_OK(open_threads(64, 1, nullptr))), true);
  }
  FaultyQueue* queue;
  std::unique_ptr<Engine> engine;
};

bool contains(const std::string& text, const char* part) {
  if (text.find(part) != std::string::npos) return true;
  std::fprintf(stderr, "  \"%s\" lacks \"%s\"\n", text.c_str(), part);
  return false;
}

}  // namespace

TEST(path_mode_grammar) {
  for (const char* plain : {"", "no-colon", "kv-0042.bin", "/a/b", "r", "ro", "rox:/a", "row", "wo:/a"})
    CHECK(!CHECK_OK(parse_path_mode(plain))->has_value());
  const auto mode = **CHECK_OK(parse_path_mode("rw,direct,sync,noatime,create:/a:b"));
  CHECK_EQ(mode.path, "/a:b");
  CHECK_EQ(mode.flags & (O_RDWR | O_DIRECT | O_SYNC | O_NOATIME | O_CREAT),
           O_RDWR | O_DIRECT | O_SYNC | O_NOATIME | O_CREAT);
  CHECK_EQ((**CHECK_OK(parse_path_mode("ro:x"))).flags & O_ACCMODE, O_RDONLY);
  for (const char* bad : {"rw:", "ro,:x", "ro,fast:x", "rw,create", "ro,direct,:x", "rw,"}) {
    const auto result = parse_path_mode(bad);
    CHECK(!result && result.error().code == Code::kInvalidArgument);
  }
}

TEST(round_trip_every_engine_buffered_and_direct) {
  TempFolder folder;
  each_engine([&](Engine& engine, const std::string& name) {
    for (const char* flags : {"rw,create:", "rw,direct,create:"}) {
      const auto file = open_file(flags + folder.path + "/" + name);
      std::mt19937_64 random(7);
      // Contiguous and scattered, aligned and not, from a byte to megabytes, and one that spans many jobs.
      std::vector<Piece> pieces;
      auto source = pattern(24 << 20, 1);
      std::vector<std::byte> copy(source.size());
      std::uint64_t offset = 3, at = 0;
      for (const std::uint64_t bytes :
           {1ull, 511ull, 512ull, 4096ull, 4096ull, 8192ull, 65536ull, 1000001ull, 5ull << 20, 3ull, 12ull << 20}) {
        pieces.push_back({file.get(), offset, source.data() + at, bytes});
        at += bytes;
        offset += bytes;
        if (random() % 2) at += 4096 - at % 4096;
        if (random() % 3 == 0) offset += 8192 - offset % 4096;
      }
      CHECK(at <= source.size());
      auto write = std::move(*CHECK_OK(engine.prepare(true, pieces)));
      CHECK(run(engine, *write) == Engine::State::kDone);
      for (Piece& piece : pieces) piece.memory = copy.data() + (piece.memory - source.data());
      auto read = std::move(*CHECK_OK(engine.prepare(false, pieces)));
      for (int round = 0; round < 3; ++round) {  // the same request again and again
        std::fill(copy.begin(), copy.end(), std::byte{0});
        CHECK(run(engine, *read) == Engine::State::kDone);
        for (const Piece& piece : pieces)
          CHECK(std::memcmp(piece.memory, source.data() + (piece.memory - copy.data()), piece.bytes) == 0);
      }
      struct stat status;
      CHECK(::fstat(file->fd(), &status) == 0);
      CHECK_EQ(static_cast<std::uint64_t>(status.st_size), pieces.back().offset + pieces.back().bytes);
      CHECK(::ftruncate(file->fd(), 0) == 0);
    }
  });
}

TEST(many_small_scattered) {
  TempFolder folder;
  each_engine([&](Engine& engine, const std::string& name) {
    const auto file = open_file("rw,create:" + folder.path + "/" + name);
    constexpr std::size_t kCount = 3000;
    auto source = pattern(kCount * 4096, 2);
    std::vector<std::byte> copy(source.size());
    std::vector<std::uint64_t> order(kCount);
    for (std::size_t i = 0; i < kCount; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), std::mt19937_64(3));
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < kCount; ++i)
      pieces.push_back({file.get(), order[i] * 4096, source.data() + i * 4096, 4096});
    auto write = std::move(*CHECK_OK(engine.prepare(true, pieces)));
    CHECK(run(engine, *write) == Engine::State::kDone);
    for (std::size_t i = 0; i < kCount; ++i) pieces[i].memory = copy.data() + i * 4096;
    auto read = std::move(*CHECK_OK(engine.prepare(false, pieces)));
    CHECK(run(engine, *read) == Engine::State::kDone);
    CHECK(copy == source);
  });
}

TEST(neighbours_become_one_job) {
  TempFolder folder;
  auto engine = std::move(*CHECK_OK(Engine::open({})));
  const auto file = open_file("rw,create:" + folder.path + "/f");
  std::vector<std::byte> memory(8 << 20);
  std::vector<Piece> joined, scattered;
  for (std::size_t i = 0; i < 256; ++i) {
    joined.push_back({file.get(), i * 4096, memory.data() + i * 4096, 4096});
    scattered.push_back({file.get(), i * 4096, memory.data() + i * 8192, 4096});
  }
  auto one = std::move(*CHECK_OK(engine->prepare(true, joined)));
  CHECK_EQ(one->num_jobs(), std::size_t{1});
  CHECK_EQ(one->iovs.size(), std::size_t{1});
  auto many = std::move(*CHECK_OK(engine->prepare(true, scattered)));
  CHECK_EQ(many->num_jobs(), std::size_t{1});
  CHECK_EQ(many->iovs.size(), std::size_t{256});
}

TEST(end_of_file_is_an_error) {
  TempFolder folder;
  each_engine([&](Engine& engine, const std::string& name) {
    for (const char* flags : {"rw,create:", "rw,direct,create:"}) {
      const auto file = open_file(flags + folder.path + "/" + name);
      CHECK(::ftruncate(file->fd(), 10000) == 0);
      std::vector<std::byte> memory(2 << 20);
      const Piece pieces[] = {{file.get(), 0, memory.data(), memory.size()}};
      auto read = std::move(*CHECK_OK(engine.prepare(false, pieces)));
      CHECK(run(engine, *read) == Engine::State::kFailed);
      CHECK(contains(Engine::error_of(*read).reason, "the file ends at offset 10000"));
      CHECK(contains(Engine::error_of(*read).reason, name.c_str()));
      CHECK(::ftruncate(file->fd(), 2 << 20) == 0);  // long enough again: the same request succeeds
      CHECK(run(engine, *read) == Engine::State::kDone);
    }
  });
}

TEST(full_disk_fails_one_request_only) {
  if (::geteuid() != 0) {
    std::fprintf(stderr, "  not run: mounting a small tmpfs needs root\n");
    return;
  }
  TempFolder folder;
  const std::string small = folder.path + "/small";
  CHECK(::mkdir(small.c_str(), 0755) == 0);
  if (::mount("tmpfs", small.c_str(), "tmpfs", 0, "size=1m") != 0) {
    std::fprintf(stderr, "  not run: mount: %s\n", std::strerror(errno));
    return;
  }
  each_engine([&](Engine& engine, const std::string&) {
    const auto full = open_file("rw,create:" + small + "/full");
    const auto fine = open_file("rw,create:" + folder.path + "/fine");
    auto memory = pattern(4 << 20, 5);
    const Piece too_much[] = {{full.get(), 0, memory.data(), memory.size()}};
    const Piece enough[] = {{fine.get(), 0, memory.data(), memory.size()}};
    auto bad = std::move(*CHECK_OK(engine.prepare(true, too_much)));
    auto good = std::move(*CHECK_OK(engine.prepare(true, enough)));
    CHECK(CHECK_OK(engine.start(*bad)));
    CHECK(CHECK_OK(engine.start(*good)));
    CHECK(finish(engine, *bad) == Engine::State::kFailed);
    CHECK(finish(engine, *good) == Engine::State::kDone);
    CHECK(contains(Engine::error_of(*bad).reason, "ENOSPC"));
    CHECK(contains(Engine::error_of(*bad).reason, "/full"));
    CHECK(contains(Engine::error_of(*bad).reason, "at offset"));
  });
  CHECK(::umount2(small.c_str(), MNT_DETACH) == 0);
}

TEST(short_results_are_continued) {
  TempFolder folder;
  FaultyEngine f;
  const auto file = open_file("rw,create:" + folder.path + "/f");
  auto source = pattern(100000, 6);
  std::vector<std::byte> copy(source.size());
  f.queue->plans = {{0, 7}, {1, 4096}, {2, 50000}, {4, 1}, {5, 99000}};
  const Piece out[] = {{file.get(), 5, source.data(), source.size()}};
  const Piece in[] = {{file.get(), 5, copy.data(), copy.size()}};
  auto write = std::move(*CHECK_OK(f.engine->prepare(true, out)));
  CHECK(run(*f.engine, *write) == Engine::State::kDone);
  auto read = std::move(*CHECK_OK(f.engine->prepare(false, in)));
  CHECK(run(*f.engine, *read) == Engine::State::kDone);
  CHECK(copy == source);
}

TEST(io_error_names_the_place_and_spares_the_others) {
  TempFolder folder;
  FaultyEngine f;
  const auto file = open_file("rw,create:" + folder.path + "/f");
  auto source = pattern(3 << 20, 8);
  const Piece first[] = {{file.get(), 0, source.data(), 3 << 20}};
  const Piece second[] = {{file.get(), 8 << 20, source.data(), 1 << 20}};
  f.queue->plans = {{1, -EIO}};
  auto bad = std::move(*CHECK_OK(f.engine->prepare(true, first)));
  auto good = std::move(*CHECK_OK(f.engine->prepare(true, second)));
  CHECK(CHECK_OK(f.engine->start(*bad)));
  CHECK(CHECK_OK(f.engine->start(*good)));
  CHECK(finish(*f.engine, *bad) == Engine::State::kFailed);
  CHECK(finish(*f.engine, *good) == Engine::State::kDone);
  CHECK(contains(Engine::error_of(*bad).reason, "write of 1048576 bytes at offset 1048576 of"));
  CHECK(contains(Engine::error_of(*bad).reason, "Input/output error (EIO, 5)"));
  CHECK(run(*f.engine, *bad) == Engine::State::kDone);  // the fault is over: the same request works
}

TEST(cancel_waits_for_the_kernel) {
  TempFolder folder;
  FaultyEngine f;
  const auto file = open_file("rw,create:" + folder.path + "/f");
  auto source = pattern(1 << 20, 9);
  const Piece pieces[] = {{file.get(), 0, source.data(), source.size()}};
  auto request = std::move(*CHECK_OK(f.engine->prepare(true, pieces)));
  f.queue->hold = true;  // as if the device did not answer
  CHECK(*CHECK_OK(f.engine->start(*request)) == Engine::State::kRunning);
  CHECK(!f.engine->start(*request));
  CHECK_EQ(f.engine->start(*request).error().code == Code::kBusy, true);
  CHECK(!f.engine->cancel(*request));
  CHECK(!f.engine->cancel(*request));
  f.queue->hold = false;
  CHECK(finish(*f.engine, *request) == Engine::State::kFailed);
  CHECK(Engine::error_of(*request).code == Code::kCancelled);
  CHECK(f.engine->cancel(*request));
  CHECK(run(*f.engine, *request) == Engine::State::kDone);
}

TEST(cancel_every_engine) {
  TempFolder folder;
  each_engine([&](Engine& engine, const std::string& name) {
    const auto file = open_file("rw,direct,create:" + folder.path + "/" + name);
    auto source = pattern(64 << 20, 10);
    const Piece pieces[] = {{file.get(), 0, source.data(), source.size()}};
    auto request = std::move(*CHECK_OK(engine.prepare(true, pieces)));
    CHECK(CHECK_OK(engine.start(*request)));
    const Deadline deadline = Deadline::after(kLimit);
    while (!engine.cancel(*request)) CHECK(!deadline.passed());
    CHECK(engine.poll(*request) != Engine::State::kRunning);
    CHECK(run(engine, *request) == Engine::State::kDone);
  });
}

TEST(lent_descriptors) {
  TempFolder folder;
  auto engine = std::move(*CHECK_OK(Engine::open({})));
  const std::string path = folder.path + "/f";
  Fd fd(::open(path.c_str(), O_RDWR | O_CREAT, 0644));
  const int number = fd.get();
  auto file = std::move(*CHECK_OK(File::borrow(number, "")));
  CHECK(contains(file->name(), path.c_str()));
  std::vector<std::byte> memory(4096);
  const Piece pieces[] = {{file.get(), 0, memory.data(), memory.size()}};
  auto request = std::move(*CHECK_OK(engine->prepare(true, pieces)));
  CHECK(run(*engine, *request) == Engine::State::kDone);
  fd.reset();
  auto closed = engine->start(*request);
  CHECK(!closed && contains(closed.error().reason, "EBADF") && contains(closed.error().reason, "closed"));
  Fd other(::open((folder.path + "/other").c_str(), O_RDWR | O_CREAT, 0644));
  CHECK_EQ(other.get(), number);  // the number is taken again: the other file must stay empty
  auto reused = engine->start(*request);
  CHECK(!reused && contains(reused.error().reason, "another file"));
  struct stat status;
  CHECK(::fstat(other.get(), &status) == 0 && status.st_size == 0);

  const auto not_open = File::borrow(987654, "");
  CHECK(!not_open && contains(not_open.error().reason, "987654"));
  Fd read_only(::open(path.c_str(), O_RDONLY));
  auto reader = std::move(*CHECK_OK(File::borrow(read_only.get(), "named")));
  const Piece forbidden[] = {{reader.get(), 0, memory.data(), 1}};
  const auto refused = engine->prepare(true, forbidden);
  CHECK(!refused && contains(refused.error().reason, "reading only"));
}

TEST(sleeper_is_woken) {
  TempFolder folder;
  each_engine([&](Engine& engine, const std::string& name) {
    if (engine.event_fd() < 0) return;  // POSIX AIO must be polled
    const auto file = open_file("rw,direct,create:" + folder.path + "/" + name);
    auto source = pattern(32 << 20, 11);
    // A large request, and many short ones, which a worker may end at any moment before and after the sleeper lies down.
    for (int round = 0; round < 300; ++round) {
      const std::size_t bytes = round == 0 ? source.size() : 20'000;
      const Piece pieces[] = {{file.get(), 100, source.data(), bytes}};
      auto request = std::move(*CHECK_OK(engine.prepare(true, pieces)));
      CHECK(CHECK_OK(engine.start(*request)));
      const Deadline deadline = Deadline::after(kLimit);
      while (engine.poll(*request) == Engine::State::kRunning) {
        if (!engine.arm()) continue;
        pollfd wait = {engine.event_fd(), POLLIN, 0};
        CHECK(::poll(&wait, 1, deadline.left_ms()) == 1);
      }
      CHECK(engine.poll(*request) == Engine::State::kDone);
    }
  });
}

// Makes a system call fail with EPERM in this process, as a container's seccomp profile does.
static void forbid(int call) {
  sock_filter code[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
                        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<unsigned>(call), 0, 1),
                        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  sock_fprog program = {4, code};
  CHECK(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  CHECK(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}

TEST(forbidden_engines_are_passed_over_with_a_reason) {
  const pid_t child = ::fork();
  if (child == 0) {
    forbid(SYS_io_uring_setup);
    forbid(SYS_io_setup);
    EngineConfig config;
    config.kind = EngineKind::kUring;
    const auto forced = Engine::open(config);
    CHECK(!forced && forced.error().code == Code::kUnsupported);
    CHECK(contains(forced.error().reason, "EPERM") && contains(forced.error().reason, "io_uring_disabled"));
    const auto automatic = Engine::open({});
    CHECK(automatic && (*automatic)->kernel_queue() == "posix_aio");
    CHECK(contains((*automatic)->reason(), "libaio: io_setup") &&
          contains((*automatic)->reason(), "io_uring: io_uring_setup"));
    ::_exit(0);
  }
  int status = 0;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(fork_leaves_the_child_clean) {
  TempFolder folder;
  each_engine([&](Engine& engine, const std::string& name) {
    const auto file = open_file("rw,create:" + folder.path + "/" + name);
    auto source = pattern(4 << 20, 12);
    const Piece pieces[] = {{file.get(), 0, source.data(), source.size()}};
    auto request = std::move(*CHECK_OK(engine.prepare(true, pieces)));
    CHECK(run(engine, *request) == Engine::State::kDone);
    const pid_t child = ::fork();
    if (child == 0) {
      engine.~Engine();
      ::_exit(0);
    }
    int status = 0;
    CHECK_EQ(::waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(run(engine, *request) == Engine::State::kDone);
  });
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
