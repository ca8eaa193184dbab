// GDS and GDS_MT over a library that stands in for cuFile and the CUDA driver, and the reasons where either is missing.
#include "backends/gds/gds.h"

#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "backends/gds/cufile.h"
#include "check.h"
#include "plans.h"

using namespace nixl::core;

namespace {

using check::has;

using check::in_child;  // libraries are opened once a process: each case has one of its own

void use_stand_in(const char* fault = "") {
  ::setenv("NIXL_CUDA_LIBRARY", STAND_IN, 1);
  ::setenv("NIXL_CUFILE_LIBRARY", STAND_IN, 1);
  ::setenv("STAND_IN_FAULT", fault, 1);
}

struct Rig {
  explicit Rig(int which, Params over = {}) {
    const BackendEntry& entry = backends_of_gds()[which];
    CHECK(entry.probe().viable);
    BackendConfig config;
    config.self = {"agent", 1};
    config.params = entry.params;
    for (const auto& [key, value] : over) config.params[key] = value;
    backend = std::move(*CHECK_OK(entry.open(std::move(config))));
    self = std::move(*CHECK_OK(backend->connect({"agent", 1}, "")));
    char text[] = "/tmp/nixl_gds_XXXXXX";
    ::close(::mkstemp(text));
    path = text;
    const Region file_region = {MemKind::kFile, 0, 0, 9, "rw:" + path};
    file = std::move(*CHECK_OK(backend->add_region(file_region)));
    target = std::move(*CHECK_OK(backend->loopback_region(*self, file_region, *file)));
  }
  ~Rig() { ::unlink(path.c_str()); }
  // `count` blocks of the buffer, every second block of the file.
  std::unique_ptr<Transfer> prepare(Op op, std::string& buffer, std::size_t count) {
    const Region memory_region = {MemKind::kVram, reinterpret_cast<std::uint64_t>(buffer.data()), buffer.size(), 0, ""};
    memory.push_back(std::move(*CHECK_OK(backend->add_region(memory_region))));
    Plan plan = test::plan_between(op, *self, *memory.back(), *target);
    plan.local_kind = MemKind::kVram;
    plan.remote_kind = MemKind::kFile;
    const std::size_t block = buffer.size() / count;
    for (std::size_t i = 0; i < count; ++i)
      test::add_block(plan, memory_region.address + i * block, 2 * i * block, block);
    return std::move(*CHECK_OK(backend->prepare(std::move(plan))));
  }
  std::string run(Transfer& transfer) {  // the error's text, or ""
    CHECK_OK(transfer.submit(std::nullopt));
    for (const Deadline limit = Deadline::after(20'000'000'000);;) {
      const auto state = transfer.poll();
      if (!state) return state.error().reason;
      if (*state == TransferState::kDone) return "";
      CHECK(!limit.passed());
    }
  }
  std::string path;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Connection> self;
  std::unique_ptr<LocalRegion> file;
  std::unique_ptr<RemoteRegion> target;
  std::vector<std::unique_ptr<LocalRegion>> memory;
};

std::string pattern(std::size_t size) {
  std::string bytes(size, 0);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>((i * 2654435761u) >> 9);
  return bytes;
}

void round_trip(int which, Params params, std::size_t count, const char* path) {
  Rig rig(which, std::move(params));
  std::string out = pattern(6'000'000), in(out.size(), '?');
  auto write = rig.prepare(Op::kWrite, out, count);
  CHECK(has(write->path(), path));
  CHECK_EQ(rig.run(*write), "");
  auto read = rig.prepare(Op::kRead, in, count);
  for (int round = 0; round < 3; ++round) {
    in.assign(in.size(), '?');
    CHECK_EQ(rig.run(*read), "");
    CHECK(in == out);
  }
}

}  // namespace

TEST(reasons_for_what_is_missing) {
  in_child([] {
    ::setenv("NIXL_CUDA_LIBRARY", "/nonexistent/libcuda.so.1", 1);
    const Probe probe = backends_of_gds()[0].probe();
    CHECK(!probe.viable && has(probe.reason, "libcuda.so.1") && has(probe.reason, "NIXL_CUDA_LIBRARY") &&
          has(probe.reason, "ls /usr/local/cuda/gds/"));
  });
  in_child([] {
    use_stand_in();
    ::setenv("NIXL_CUFILE_LIBRARY", "/nonexistent/libcufile.so.0", 1);
    const Probe probe = backends_of_gds()[1].probe();
    CHECK(!probe.viable && has(probe.reason, "libcufile.so.0") && has(probe.reason, "ls /usr/local/cuda/gds/"));
  });
  in_child([] {
    use_stand_in("driver");
    BackendConfig config;
    const auto opened = backends_of_gds()[0].open(std::move(config));
    CHECK(!opened && has(opened.error().reason, "5001") && has(opened.error().reason, "CUFILE_ALLOW_COMPAT_MODE"));
  });
}

TEST(parameters) {
  in_child([] {
    use_stand_in();
    for (const auto& [which, key] :
         {std::pair{0, "batch_limit"}, {0, "batch_pool_size"}, {0, "max_request_size"}, {1, "thread_count"}})
      for (const char* value : {"0", "-1", "lots"}) {
        BackendConfig config;
        config.params = {{key, value}};
        const auto opened = backends_of_gds()[which].open(std::move(config));
        CHECK(!opened && opened.error().code == Code::kInvalidArgument && has(opened.error().reason, key) &&
              has(opened.error().reason, value));
      }
    CHECK_EQ(backends_of_gds()[0].excludes[0], "GDS_MT");
    CHECK_EQ(backends_of_gds()[1].threads_param, "thread_count");
  });
}

TEST(batches_threads_and_single_calls) {
  for (const char* fault : {"", "short"})
    in_child([&] {
      use_stand_in(fault);
      round_trip(0, {}, 500, "cufile_batch");
      round_trip(0, {{"batch_limit", "7"}, {"batch_pool_size", "1"}}, 100, "cufile_batch");
      round_trip(0, {{"max_request_size", "100000"}}, 1, "cufile_batch");  // one piece, cut into sixty
      round_trip(0, {}, 1, "cufile");
      round_trip(1, {{"thread_count", "3"}}, 500, "cufile");
    });
}

// cuFile does not take the file: our own buffers carry the bytes, and the path tells.
TEST(a_file_that_cufile_refuses_goes_staged) {
  for (const int which : {0, 1})
    in_child([&] {
      use_stand_in("file");
      round_trip(which, {}, 40, "staged+threads");
    });
}

TEST(faults_name_the_place) {
  in_child([] {
    use_stand_in("entry");
    Rig rig(0);
    std::string out = pattern(4'000'000);
    auto write = rig.prepare(Op::kWrite, out, 40);
    const std::string error = rig.run(*write);
    CHECK(has(error, "write of 100000 bytes at offset 400000") && has(error, rig.path.c_str()) &&
          has(error, "status 64"));
  });
  in_child([] {
    use_stand_in("io");
    Rig rig(1);
    std::string out = pattern(4096);
    CHECK(has(rig.run(*rig.prepare(Op::kWrite, out, 1)), "EIO"));
  });
  in_child([] {
    use_stand_in();
    Rig rig(1);
    std::string in(4096, '?');
    CHECK(has(rig.run(*rig.prepare(Op::kRead, in, 1)), "the file ends at offset 0"));
  });
}

TEST(cancel) {
  in_child([] {
    use_stand_in();
    Rig rig(1, {{"thread_count", "1"}});
    std::string out = pattern(8'000'000);
    auto write = rig.prepare(Op::kWrite, out, 4000);
    CHECK_OK(write->submit(std::nullopt));
    for (const Deadline limit = Deadline::after(20'000'000'000); !write->cancel();) CHECK(!limit.passed());
    const auto state = write->poll();
    CHECK(state ? *state == TransferState::kDone : state.error().code == Code::kCancelled);
    CHECK_EQ(rig.run(*write), "");
  });
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
