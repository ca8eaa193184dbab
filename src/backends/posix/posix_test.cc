// What the conformance suite does not ask of POSIX: its descriptors, its parameters, its queries.
#include "backends/posix/posix.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/fd.h"
#include "check.h"
#include "plans.h"

using namespace nixl::core;

namespace {

const BackendEntry& entry() {
  return backends_of_posix()[0];
}

std::unique_ptr<Backend> open_with(Params over = {}) {
  BackendConfig config;
  config.self = {"agent", 1};
  config.params = entry().params;
  for (const auto& [key, value] : over) config.params[key] = value;
  return std::move(*CHECK_OK(entry().open(std::move(config))));
}
std::string refusal(Params over) {
  BackendConfig config;
  config.self = {"agent", 1};
  config.params = std::move(over);
  const auto opened = entry().open(std::move(config));
  CHECK(!opened);
  return opened.error().reason;
}

std::string temp_path() {
  char text[] = "/tmp/nixl_posix_XXXXXX";
  const int fd = ::mkstemp(text);
  CHECK(fd >= 0);
  ::close(fd);
  return text;
}
Region file_region(std::uint64_t id, const std::string& meta) {
  return {MemKind::kFile, 0, 0, id, meta};
}

}  // namespace

// "GPU memory" of a library that stands in for the driver: through the page cache and around it, scattered, and a copy
// that fails.
static void move_gpu_memory() {
  ::setenv("NIXL_CUDA_LIBRARY", STAND_IN, 1);
  for (const char* flags : {"rw:", "rw,direct:"}) {
    const std::string path = temp_path();
    auto backend = open_with();
    CHECK(backend->abilities().local_kinds.has(MemKind::kVram));
    auto self = std::move(*CHECK_OK(backend->connect({"agent", 1}, "")));
    auto file = std::move(*CHECK_OK(backend->add_region(file_region(5, flags + path))));
    auto target = std::move(*CHECK_OK(backend->loopback_region(*self, file_region(5, flags + path), *file)));
    std::string memory(7'000'123, '?'), sent(memory.size(), 0);
    for (std::size_t i = 0; i < sent.size(); ++i) sent[i] = static_cast<char>((i * 2654435761u) >> 9);
    const Region region = {MemKind::kVram, reinterpret_cast<std::uint64_t>(memory.data()), memory.size(), 0, ""};
    auto gpu = std::move(*CHECK_OK(backend->add_region(region)));
    const auto no_such = backend->add_region({MemKind::kVram, region.address, 1, 3, ""});
    CHECK(!no_such &&
          no_such.error().reason == "POSIX cannot take VRAM_SEG: GPU 3: this process sees 1, numbered from 0");
    // Pieces side by side in the file, in reversed order in memory: many of them fill one buffer.
    const auto run = [&](Op op, std::size_t piece) -> std::string {
      Plan plan = test::plan_between(op, *self, *gpu, *target);
      plan.local_kind = MemKind::kVram;
      plan.remote_kind = MemKind::kFile;
      for (std::size_t at = 0; at < memory.size(); at += piece) {
        const std::size_t bytes = std::min(piece, memory.size() - at);
        test::add_block(plan, region.address + memory.size() - at - bytes, at, bytes);
      }
      auto transfer = std::move(*CHECK_OK(backend->prepare(std::move(plan))));
      CHECK(transfer->path().find("staged+") == 0);
      CHECK_OK(transfer->submit(std::nullopt));
      for (const Deadline limit = Deadline::after(20'000'000'000);;) {
        const auto state = transfer->poll();
        if (!state) return state.error().reason;
        if (*state == TransferState::kDone) return "";
        CHECK(!limit.passed());
      }
    };
    for (const std::size_t piece : {1'000ul, 65'536ul, 8'000'000ul}) {
      memory = sent;
      CHECK_EQ(run(Op::kWrite, piece), "");
      std::fill(memory.begin(), memory.end(), '?');
      CHECK_EQ(run(Op::kRead, piece), "");
      CHECK(memory == sent);
    }
    ::setenv("STAND_IN_FAULT", "copy", 1);
    for (const Op op : {Op::kWrite, Op::kRead}) {
      const std::string error = run(op, 8'000'000);
      CHECK(error.find(path + ": copy through host memory: GPU 0: cuMemcpyAsync: CUDA driver error 700") != error.npos);
    }
    ::setenv("STAND_IN_FAULT", "", 1);
    ::unlink(path.c_str());
  }
}
TEST(gpu_memory_goes_through_host_buffers) {
  check::in_child(move_gpu_memory);  // first, and in a process of its own: the driver is looked for once
}

TEST(path_mode_ids_are_unique_while_in_use) {
  const std::string path = temp_path();
  auto backend = open_with();
  auto first = std::move(*CHECK_OK(backend->add_region(file_region(5, "rw:" + path))));
  const auto second = backend->add_region(file_region(5, "ro:" + path));
  CHECK(!second && second.error().code == Code::kInvalidArgument);
  CHECK(second.error().reason.find("5") != std::string::npos && second.error().reason.find(path) != std::string::npos);
  auto other = std::move(*CHECK_OK(backend->add_region(file_region(6, "ro:" + path))));
  first.reset();
  CHECK_OK(backend->add_region(file_region(5, "ro:" + path)));
  ::unlink(path.c_str());
}

TEST(path_mode_creates_and_closes) {
  const std::string path = temp_path();
  ::unlink(path.c_str());
  auto backend = open_with();
  const auto missing = backend->add_region(file_region(1, "rw:" + path));
  CHECK(!missing && missing.error().code == Code::kIo);
  CHECK(missing.error().reason.find("ENOENT") != std::string::npos &&
        missing.error().reason.find(path) != std::string::npos);
  auto region = std::move(*CHECK_OK(backend->add_region(file_region(1, "rw,create:" + path))));
  struct stat status;
  CHECK(::stat(path.c_str(), &status) == 0);
  CHECK_EQ(status.st_mode & 0777u & ~0022u, 0644u & ~0022u);
  ::unlink(path.c_str());
}

TEST(every_other_text_means_the_descriptor) {
  const std::string path = temp_path();
  auto backend = open_with();
  Fd fd(::open(path.c_str(), O_RDWR));
  for (const char* meta : {"", "no-colon", "kv-0042.bin", "/a/b"})
    CHECK_OK(backend->add_region(file_region(fd.get(), meta)));
  for (const char* meta : {"rw,fast:/x", "ro:", "rw,create"}) {
    const auto bad = backend->add_region(file_region(fd.get(), meta));
    CHECK(!bad && bad.error().code == Code::kInvalidArgument);
  }
  const auto closed = backend->add_region(file_region(98765, ""));
  CHECK(!closed && closed.error().code == Code::kInvalidArgument &&
        closed.error().reason.find("98765") != std::string::npos);
  const auto big = backend->add_region(file_region(1ull << 40, ""));
  CHECK(!big && big.error().code == Code::kInvalidArgument);
  ::unlink(path.c_str());
}

TEST(thousands_of_registrations_share_one_descriptor) {
  const std::string path = temp_path();
  auto backend = open_with();
  Fd fd(::open(path.c_str(), O_RDWR));
  std::vector<std::unique_ptr<LocalRegion>> regions;
  for (int i = 0; i < 20000; ++i)
    regions.push_back(std::move(*CHECK_OK(backend->add_region(file_region(fd.get(), "")))));
  Fd next(::open("/dev/null", O_RDONLY));
  CHECK(next.get() < fd.get() + 100);
  ::unlink(path.c_str());
}

TEST(wrong_kinds_and_foreign_peers) {
  auto backend = open_with();
  CHECK(!backend->add_region({MemKind::kObject, 0, 0, 0, "key"}));
  const auto foreign = backend->connect({"stranger", 2}, "");
  CHECK(!foreign && foreign.error().code == Code::kInvalidArgument &&
        foreign.error().reason.find("stranger") != std::string::npos);
  Plan plan;
  plan.local_kind = plan.remote_kind = MemKind::kDram;
  const auto wrong = backend->prepare(plan);
  CHECK(!wrong && wrong.error().code == Code::kInvalidArgument &&
        wrong.error().reason.find("DRAM_SEG") != std::string::npos);
}

TEST(parameters) {
  CHECK(refusal({{"use_uring", "true"}, {"use_aio", "1"}}).find("use_uring") != std::string::npos);
  CHECK(refusal({{"use_uring", "maybe"}}).find("maybe") != std::string::npos);
  CHECK(refusal({{"kernel_queue_size", "many"}}).find("16 to 1024") != std::string::npos);
  open_with({{"kernel_queue_size", "1"}, {"ios_pool_size", "1000000"}});  // brought into the range
  open_with({{"use_posix_aio", "1"}, {"use_aio", ""}});
}

TEST(query_memory) {
  const std::string path = temp_path();
  CHECK(::truncate(path.c_str(), 12345) == 0);
  auto backend = open_with();
  const std::vector<Region> regions = {file_region(0, path), file_region(0, path + ".no"), file_region(0, "ro:" + path),
                                       file_region(0, "")};
  const auto answers = *CHECK_OK(backend->memory_query()->query(regions));
  CHECK_EQ(answers.size(), 4u);
  CHECK(answers[0] && answers[2] && !answers[1] && !answers[3]);
  CHECK_EQ(answers[0]->at("size"), "12345");
  CHECK_EQ(answers[0]->size(), 3u);
  CHECK(std::stoul(answers[0]->at("mode")) == 0100600u && std::stoul(answers[0]->at("mtime")) > 0);
  CHECK_OK(backend->memory_query()->query({}));
  ::unlink(path.c_str());
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
