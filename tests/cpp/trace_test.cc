// What a profiler sees of an agent: a library takes NVTX's calls, as Nsight Systems does.
#include <dlfcn.h>
#include <nixl/agent.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "check.h"

using namespace nixl;

namespace {

std::string lines() {
  void* const listener = ::dlopen(LISTENER, RTLD_NOW | RTLD_NOLOAD);
  if (!listener) return "";
  using Lines = const char* (*)();
  return reinterpret_cast<Lines>(::dlsym(listener, "listener_lines"))();
}

bool has(const std::string& all, const std::string& line) {
  return ("\n" + all).find("\n" + line + "\n") != std::string::npos;
}

AgentConfig loopback(const char* delay_us = "0") {
  AgentConfig config;
  config.backends = {"LOOPBACK"};
  config.backend_params = {{"LOOPBACK", {{"delay_us", delay_us}}}};
  return config;
}

// One WRITE of 4096 bytes from "a" to "b", one READ of 64 back, and a notification.
void work(const char* delay_us) {
  std::vector<char> here(4096), there(4096);
  Agent a("a", loopback(delay_us)), b("b", loopback());
  auto mine = a.registerMemory({{here.data(), here.size(), 0}}),
       theirs = b.registerMemory({{there.data(), there.size(), 0}});
  a.addRemoteAgent(b.getMetadata());
  b.addRemoteAgent(a.getMetadata());
  const auto run = [&](const XferHandle& x) {
    for (XferState state = a.postTransfer(x); state != XferState::DONE;) state = a.checkTransfer(x);
  };
  const auto write = a.prepareTransfer(OpType::WRITE, {{here.data(), 4096, 0}}, {{there.data(), 4096, 0}}, "b");
  run(write);
  run(write);
  run(a.prepareTransfer(OpType::READ, {{here.data(), 64, 0}}, {{there.data(), 64, 0}}, "b"));
  a.sendNotif("b", "12345");
}

}  // namespace

TEST(without_a_profiler_nothing_is_loaded) {
  work("0");
  CHECK(::dlopen(LISTENER, RTLD_NOW | RTLD_NOLOAD) == nullptr);
}

TEST(a_profiler_sees_every_transfer_begin_and_end) {
  ::setenv("NVTX_INJECTION64_PATH", LISTENER, 1);
  int next = 1;
  for (const char* delay_us : {"0", "3000"}) {  // ended by the call that posts, and later
    work(delay_us);
    const std::string seen = lines();
    if (next == 1) CHECK(has(seen, "domain nixl"));
    for (const char* what : {"WRITE LOOPBACK to b 4096", "WRITE LOOPBACK to b 4096", "READ LOOPBACK from b 64"}) {
      const std::string number = std::to_string(next++);
      CHECK(has(seen, "start " + number + " " + what));
      CHECK(seen.find("start " + number + " ") < seen.find("end " + number + "\n"));
      CHECK(has(seen, "end " + number));
    }
    CHECK(!has(seen, "end " + std::to_string(next)));
    CHECK(has(seen, "push register_memory\npop"));
    CHECK(has(seen, "push load_metadata\npop"));
    CHECK(has(seen, "push make_request\npop"));
    CHECK(has(seen, "mark notify b 5"));
  }
}

TEST(a_cancelled_transfer_ends_its_range) {
  std::vector<char> memory(128);
  Agent a("a", loopback("1000000"));
  auto held = a.registerMemory({{memory.data(), memory.size(), 0}});
  const auto x = a.prepareTransfer(OpType::WRITE, {{memory.data(), 64, 0}}, {{memory.data() + 64, 64, 0}}, "a");
  (void)lines();
  CHECK(a.postTransfer(x) == XferState::PROC);
  CHECK(lines().find("end ") == std::string::npos);
  a.releaseTransfer(x);
  CHECK(lines().find("end ") != std::string::npos);
}

TEST(another_name_switches_it_off) {
  (void)lines();
  ::setenv("NIXL_TRACE_BACKENDS", "other", 1);
  work("0");
  CHECK_EQ(lines(), std::string());
  ::unsetenv("NVTX_INJECTION64_PATH");
  ::setenv("NIXL_TRACE_BACKENDS", "nvtx", 1);
  work("0");
  CHECK(lines().find("start ") != std::string::npos);
}

int main(int argc, char** argv) {
  ::setenv("NIXL_LOOPBACK", "y", 1);
  ::unsetenv("NVTX_INJECTION64_PATH");
  ::unsetenv("NIXL_TRACE_BACKENDS");
  return check::run_tests(argc, argv);
}
