// What the conformance suite does not ask of HF3FS: its mount, its parameters, its library, a client that fails.
#include "backends/hf3fs/hf3fs.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "base/clock.h"
#include "base/fd.h"
#include "check.h"
#include "plans.h"

using namespace nixl::core;

namespace {

bool has(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

const BackendEntry& entry() {
  return backends_of_hf3fs()[0];
}

// A directory that the stand-in serves as a mounted 3FS.
struct Mount {
  std::string path = "/tmp/nixl_3fs_XXXXXX";
  Mount() {
    CHECK(::mkdtemp(path.data()) != nullptr);
    ::setenv("NIXL_HF3FS_LIBRARY", STAND_IN_3FS, 1);
    ::setenv("STAND_IN_3FS_MOUNT", path.c_str(), 1);
  }
  ~Mount() {
    ::unsetenv("STAND_IN_FAULT");
    std::filesystem::remove_all(path);
  }
  Result<std::unique_ptr<Backend>> open(Params over = {}) const {
    BackendConfig config;
    config.self = {"agent", 1};
    config.params = entry().params;
    config.params["mount_point"] = path;
    for (const auto& [key, value] : over) config.params[key] = value;
    return entry().open(std::move(config));
  }
};

Region file_region(std::uint64_t id, const std::string& meta) {
  return {MemKind::kFile, 0, 0, id, meta};
}

// One transfer between `memory` and a file; its error, or "".
std::string move(Backend& backend, Op op, std::vector<char>& memory, const Region& file,
                 MemKind kind = MemKind::kDram) {
  auto self = std::move(*CHECK_OK(backend.connect({"agent", 1}, "")));
  const Region piece{kind, reinterpret_cast<std::uint64_t>(memory.data()), memory.size(), 0, ""};
  auto local = std::move(*CHECK_OK(backend.add_region(piece)));
  auto place = std::move(*CHECK_OK(backend.add_region(file)));
  auto remote = std::move(*CHECK_OK(backend.loopback_region(*self, file, *place)));
  Plan plan = test::plan_between(op, *self, *local, *remote);
  plan.local_kind = kind;
  plan.remote_kind = MemKind::kFile;
  test::add_block(plan, piece.address, 0, memory.size());
  auto transfer = std::move(*CHECK_OK(backend.prepare(std::move(plan))));
  CHECK_EQ(transfer->path(), kind == MemKind::kDram ? "usrbio" : "staged+threads");
  const Deadline deadline = Deadline::after(10'000'000'000);
  for (auto state = transfer->submit(std::nullopt);; state = transfer->poll()) {
    if (!state) return state.error().reason;
    if (*state == TransferState::kDone) return "";
    CHECK(!deadline.passed());
  }
}

std::vector<char> pattern(std::size_t bytes) {
  std::vector<char> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<char>(i * 7 + i / 251);
  return data;
}

}  // namespace

// These two come first: libraries are opened, and GPUs looked for, once a process.
TEST(without_the_library) {
  check::in_child([] {
    ::setenv("NIXL_HF3FS_LIBRARY", "/nonexistent/libhf3fs_api_shared.so", 1);
    const Probe probe = entry().probe();
    CHECK(!probe.viable && has(probe.reason, "libhf3fs_api_shared.so") && has(probe.reason, "NIXL_HF3FS_LIBRARY"));
  });
}

// "GPU memory" of a library that stands in for the driver.
TEST(gpu_memory_is_staged) {
  check::in_child([] {
    const Mount mount;
    ::setenv("NIXL_CUDA_LIBRARY", STAND_IN, 1);
    CHECK(entry().probe().kinds.has(MemKind::kVram));
    auto backend = std::move(*CHECK_OK(mount.open()));
    std::vector<char> out = pattern(3'000'001), in(out.size());
    CHECK_EQ(move(*backend, Op::kWrite, out, file_region(1, "rw,create:" + mount.path + "/f"), MemKind::kVram), "");
    CHECK_EQ(move(*backend, Op::kRead, in, file_region(1, "ro:" + mount.path + "/f"), MemKind::kVram), "");
    CHECK(in == out);
  });
}

TEST(there_and_back) {
  const Mount mount;
  auto backend = std::move(*CHECK_OK(mount.open()));
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4097}, std::size_t{5'000'003}}) {
    std::vector<char> out = pattern(bytes), in(bytes);
    const std::string path = mount.path + "/" + std::to_string(bytes);
    CHECK_EQ(move(*backend, Op::kWrite, out, file_region(1, "rw,create:" + path)), "");
    const Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    for (int turn = 0; turn < 2; ++turn) {  // the client refuses a file that is made known twice, or not any more
      std::fill(in.begin(), in.end(), 0);
      CHECK_EQ(move(*backend, Op::kRead, in, file_region(static_cast<std::uint64_t>(fd.get()), path)), "");
      CHECK(in == out);
    }
    auto first = std::move(*CHECK_OK(backend->add_region(file_region(static_cast<std::uint64_t>(fd.get()), ""))));
    auto second = std::move(*CHECK_OK(backend->add_region(file_region(static_cast<std::uint64_t>(fd.get()), ""))));
    first.reset();
    CHECK_EQ(move(*backend, Op::kRead, in, file_region(static_cast<std::uint64_t>(fd.get()), "")), "");
  }
}

TEST(short_answers_are_gone_on_with) {
  const Mount mount;
  auto backend = std::move(*CHECK_OK(mount.open({{"iopool_size", "2"}})));
  ::setenv("STAND_IN_FAULT", "short", 1);
  std::vector<char> out = pattern(50'000), in(50'000);
  CHECK_EQ(move(*backend, Op::kWrite, out, file_region(1, "rw,create:" + mount.path + "/f")), "");
  CHECK_EQ(move(*backend, Op::kRead, in, file_region(1, "ro:" + mount.path + "/f")), "");
  CHECK(in == out);
}

TEST(a_client_that_fails) {
  const Mount mount;
  auto backend = std::move(*CHECK_OK(mount.open()));
  std::vector<char> data = pattern(3 << 20);
  const Region file = file_region(1, "rw,create:" + mount.path + "/f");
  ::setenv("STAND_IN_FAULT", "io", 1);
  CHECK(has(move(*backend, Op::kWrite, data, file), "EIO"));
  ::unsetenv("STAND_IN_FAULT");
  CHECK_EQ(move(*backend, Op::kWrite, data, file), "");
  std::vector<char> more(data.size() + 1);
  CHECK(has(move(*backend, Op::kRead, more, file), "the file ends at offset"));
  ::setenv("STAND_IN_FAULT", "register", 1);
  const auto refused = backend->add_region(file_region(2, "rw,create:" + mount.path + "/g"));
  CHECK(!refused && has(refused.error().reason, "EACCES") && has(refused.error().reason, "hf3fs_reg_fd"));
  ::setenv("STAND_IN_FAULT", "ring", 1);
  CHECK(has(move(*backend, Op::kWrite, data, file), "EPIPE"));
  CHECK(has(move(*backend, Op::kWrite, data, file), "EPIPE"));
  ::setenv("STAND_IN_FAULT", "memory", 1);
  const auto none = mount.open();
  CHECK(!none && has(none.error().reason, "hf3fs_iovcreate") && has(none.error().reason, "ENOMEM"));
}

TEST(files_outside_the_mount) {
  const Mount mount;
  auto backend = std::move(*CHECK_OK(mount.open()));
  char other[] = "/tmp/nixl_other_XXXXXX";
  const Fd fd(::mkstemp(other));
  std::filesystem::create_symlink(other, mount.path + "/link");
  for (const Region& region :
       {file_region(static_cast<std::uint64_t>(fd.get()), ""), file_region(1, std::string("rw:") + other),
        file_region(1, "rw,create:" + mount.path + "/../nixl_never_made"), file_region(1, "rw:" + mount.path + "/link"),
        file_region(1, "rw,create:" + mount.path + "x")}) {
    const auto added = backend->add_region(region);
    CHECK(!added && added.error().code == Code::kInvalidArgument);
    CHECK(has(added.error().reason, mount.path.c_str()) && has(added.error().reason, "not inside"));
  }
  CHECK(!std::filesystem::exists("/tmp/nixl_never_made") && !std::filesystem::exists(mount.path + "x"));
  ::unlink(other);
}

TEST(parameters) {
  const Mount mount;
  using Wrong = std::pair<const char*, const char*>;
  for (const auto& [key, value] :
       {Wrong{"mem_config", "everything"}, {"mem_config", "dram_zc"}, {"iopool_size", "x"}, {"mount_point", "/proc"}}) {
    const auto opened = mount.open({{key, value}});
    CHECK(!opened && has(opened.error().reason, key));
  }
  for (const char* memory : {"", "auto", "dram"})
    CHECK_OK(mount.open({{"mem_config", memory}, {"iopool_size", "9999999"}}));
  CHECK(!entry().list_params && entry().local && !entry().remote);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
