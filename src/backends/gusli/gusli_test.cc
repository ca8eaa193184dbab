// Configuration texts, limits of volumes, a loop device where one can be made.
#include "backends/gusli/gusli.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <string>

#include "check.h"
#include "fuzz.h"
#include "plans.h"

using namespace nixl::core;

namespace {

using check::has;
Result<std::unique_ptr<Backend>> try_open(const std::string& text, Params over = {}) {
  BackendConfig config;
  config.self = {"agent", 1};
  config.params = backends_of_gusli()[0].params;
  config.params["config_file"] = text;
  for (const auto& [key, value] : over) config.params[key] = value;
  return backends_of_gusli()[0].open(std::move(config));
}
std::string refusal(const std::string& text, Params over = {}) {
  const auto opened = try_open(text, std::move(over));
  CHECK(!opened);
  return opened.error().reason;
}

struct TempFile {
  explicit TempFile(off_t bytes) {
    char text[] = "/tmp/nixl_gusli_XXXXXX";
    ::close(::mkstemp(text));
    path = text;
    CHECK(::truncate(text, bytes) == 0);
  }
  ~TempFile() { ::unlink(path.c_str()); }
  std::string path;
};

Region volume(std::uint64_t id) {
  return {MemKind::kBlock, 0, 0, id, ""};
}

// Prepares one piece; the error's text or "".
struct Rig {
  Rig(const std::string& text, std::uint64_t id) {
    backend = std::move(*CHECK_OK(try_open(text)));
    self = std::move(*CHECK_OK(backend->connect({"agent", 1}, "")));
    owned = std::move(*CHECK_OK(backend->add_region(volume(id))));
    target = std::move(*CHECK_OK(backend->loopback_region(*self, volume(id), *owned)));
  }
  std::string run(Op op, std::uint64_t offset, std::string& memory) {
    const Region region = {MemKind::kDram, reinterpret_cast<std::uint64_t>(memory.data()), memory.size(), 0, ""};
    const auto local = std::move(*CHECK_OK(backend->add_region(region)));
    Plan plan = test::plan_between(op, *self, *local, *target);
    plan.remote_kind = MemKind::kBlock;
    test::add_block(plan, region.address, offset, region.length);
    auto transfer = backend->prepare(std::move(plan));
    if (!transfer) return transfer.error().reason;
    CHECK_OK((*transfer)->submit(std::nullopt));
    for (const Deadline limit = Deadline::after(20'000'000'000);;) {
      const auto state = (*transfer)->poll();
      if (!state) return state.error().reason;
      if (*state == TransferState::kDone) return "";
      CHECK(!limit.passed());
    }
  }
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Connection> self;
  std::unique_ptr<LocalRegion> owned;
  std::unique_ptr<RemoteRegion> target;
};

}  // namespace

TEST(configuration_names_the_bad_line) {
  const TempFile file(4096);
  const std::string good = "7 F W N " + file.path + " sec=0x3\n";
  CHECK_OK(try_open(""));
  CHECK_OK(try_open("# volumes\nversion=1\n\n" + good + "# end"));
  CHECK(has(refusal("version=2\n" + good), "line 1 \"version=2\""));
  CHECK(has(refusal(good), "version=1"));
  CHECK(has(refusal("version=1\n" + good + good), "line 3") && has(refusal("version=1\n" + good + good), "twice"));
  for (const char* line : {"7 F W N /x", "x F W N /x sec=0", "7 Q W N /x sec=0", "7 F X N /x sec=0", "7 F W 1 /x sec=0",
                           "7 F W N /x open"})
    CHECK(has(refusal("version=1\n# c\n" + std::string(line)), "line 3"));
  CHECK(has(refusal("version=1\n7 F W N /nonexistent/f sec=0x3"), "ENOENT"));
  CHECK(has(refusal("version=1\n7 K W N " + file.path + " sec=0x3"), "no block device"));
  CHECK(has(refusal("version=1\n7 N W N t10.0.0.1 sec=0x3"), "libgusli_clnt.so"));
  CHECK(has(refusal("", {{"max_num_simultaneous_requests", "0"}}), "max_num_simultaneous_requests"));
  CHECK(has(refusal("", {{"try_use_uring", "perhaps"}}), "try_use_uring"));
}

TEST(limits_of_a_volume) {
  const TempFile file(10'000);
  const std::string text =
      "version=1\n7 F W N " + file.path + " sec=0x3\n8 F R N " + file.path + " sec=0x3\n9 F R N /dev/zero sec=0x3\n";
  Rig rig(text, 7);
  std::string bytes(1000, 'x'), back(1000, '?');
  CHECK_EQ(rig.run(Op::kWrite, 9'000, bytes), "");
  CHECK(has(rig.run(Op::kWrite, 9'001, bytes), "beyond its 10000 bytes"));
  const auto unknown = rig.backend->add_region(volume(5));
  CHECK(!unknown && unknown.error().code == Code::kInvalidArgument && has(unknown.error().reason, "no volume 5") &&
        has(unknown.error().reason, "7, 8, 9"));
  Rig reader(text, 8);
  CHECK_EQ(reader.run(Op::kRead, 9'000, back), "");
  CHECK(back == bytes);
  CHECK(has(reader.run(Op::kWrite, 0, bytes), "access is R"));
  Rig zero(text, 9);
  CHECK_EQ(zero.run(Op::kRead, 1 << 20, back), "");
  CHECK(back == std::string(1000, '\0'));
}

TEST(kernel_block_device) {
  const TempFile file(8 << 20);
  FILE* made = ::popen(("losetup --show -f " + file.path + " 2>/dev/null").c_str(), "r");
  char device[64] = "";
  (void)!std::fscanf(made, "%63s", device);
  if (::pclose(made) != 0 || !device[0]) {
    std::fprintf(stderr, "  not run: no loop device can be made\n");
    return;
  }
  {
    Rig rig("version=1\n1 K W N " + std::string(device) + " sec=0x3\n", 1);
    std::string bytes(1 << 20, 'x'), back(1 << 20, '?'), odd(100, 'x');
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 31 >> 4);
    CHECK_EQ(rig.run(Op::kWrite, 512, bytes), "");
    CHECK_EQ(rig.run(Op::kRead, 512, back), "");
    CHECK(back == bytes);
    CHECK(has(rig.run(Op::kWrite, 512, odd), "multiples of its block of 512 bytes"));
    CHECK(has(rig.run(Op::kRead, 8 << 20, back), "beyond its 8388608 bytes"));
  }
  CHECK(std::system(("losetup -d " + std::string(device)).c_str()) == 0);
}

TEST(damaged_configuration_is_refused_or_read_and_no_more) {
  TempFile file(1 << 20);
  check::fuzz(
      "version=1\n# comment\n7 F W N " + file.path + " sec=0x3\n8 F R Y " + file.path + " sec=0x0\n",
      [](const std::string& text) {
        const auto opened = try_open(text);
        if (!opened) CHECK(!opened.error().reason.empty());
      },
      1'000);  // each starts and ends a thread
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
