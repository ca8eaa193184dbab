// The public C++ class between agents of one process, on the reference backend.
#include <nixl/agent.h>
#include <nixl/backend.h>
#include <poll.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <thread>

#include "check.h"

using namespace nixl;

namespace {

AgentConfig loopback(Params params = {}) {
  AgentConfig config;
  config.backends = {"LOOPBACK"};
  config.backend_params = {{"LOOPBACK", std::move(params)}};
  return config;
}

struct Pair {
  explicit Pair(AgentConfig config = loopback()) : a("a", config), b("b", config) {
    a.addRemoteAgent(b.getMetadata());
    b.addRemoteAgent(a.getMetadata());
  }
  Agent a, b;
};

template <class Call>
Error error_of(Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  check::failed(__FILE__, __LINE__, "no nixl::Error was thrown");
}

void finish(Agent& agent, const XferHandle& x) {
  while (agent.checkTransfer(x) != XferState::DONE) {
  }
}

}  // namespace

TEST(write_and_read) {
  std::vector<char> here(4096, 'h'), there(4096, 't');
  Agent a("a", loopback());
  Agent b = {"b", loopback()};
  void* addr = here.data();
  std::size_t size = here.size();
  std::vector<MemDescriptor> mine = {{addr, size, 0, MemType::DRAM}};
  std::vector<MemDescriptor> theirs = {{there.data(), static_cast<int>(there.size()), 0}};
  auto reg = a.registerMemory(mine, "LOOPBACK");
  auto far = b.registerMemory(theirs);
  CHECK_EQ(a.addRemoteAgent(b.getMetadata()), "b");
  auto x = a.prepareTransfer(OpType::WRITE, mine, theirs, "b", "LOOPBACK", "done");
  a.postTransfer(x);
  finish(a, x);
  CHECK(there == here);
  auto notifs = b.getNewNotifs();
  CHECK_EQ(notifs["a"].size(), 1u);
  CHECK_EQ(notifs["a"][0], "done");
  std::memset(there.data(), 'r', there.size());
  auto y = a.prepareTransfer(OpType::READ, mine, theirs, "b");
  a.postTransfer(y);
  CHECK(a.waitTransfer(y, std::chrono::seconds(5)) == XferState::DONE);
  CHECK(here == there);
  a.releaseTransfer(x);
  a.releaseTransfer(x);
  a.deregisterMemory(reg);
  a.deregisterMemory(reg);
}

TEST(errors_have_status_and_reason) {
  Pair pair;
  char buffer[64];
  std::vector<MemDescriptor> descs = {{buffer, 64, 0}};
  CHECK_EQ(error_of([&] { pair.a.prepareTransfer(OpType::WRITE, descs, descs, "b"); }).code(), -4);
  CHECK_EQ(error_of([&] { pair.a.prepareTransfer(OpType::WRITE, descs, descs, "nobody"); }).code(), -4);
  CHECK_EQ(error_of([&] { pair.a.registerMemory(descs, "UVX"); }).code(), -4);
  CHECK_EQ(error_of([&] { MemDescriptor(buffer, -1, 0); }).code(), -2);
  CHECK_EQ(error_of([&] { pair.a.addRemoteAgent("garbage"); }).code(), -5);
  CHECK_EQ(error_of([&] { pair.a.addRemoteAgent(pair.a.getMetadata()); }).code(), -2);
  CHECK_EQ(error_of([&] { pair.a.createBackend("LOOPBACK"); }).code(), -2);
  const Error unknown = error_of([&] { pair.a.createBackend("UVX"); });
  CHECK(std::string(unknown.what()).rfind("NIXL_ERR_NOT_FOUND: ", 0) == 0);
  CHECK_EQ(error_of([&] { pair.a.sendNotif("nobody", "x"); }).code(), -4);
}

TEST(values_outside_their_types_are_refused_by_name) {
  Pair pair;
  Agent& a = pair.a;
  std::vector<char> memory(64);
  const std::vector<MemDescriptor> mine = {{memory.data(), 64, 0}};
  a.registerMemory(mine);
  const MemType kind = static_cast<MemType>(9);
  const auto says = [](const Error& error, const char* text) {
    if (error.code() == -2 && error.reason().find(text) != std::string::npos) return true;
    std::fprintf(stderr, "'%s' is not in: %s\n", text, error.what());
    return false;
  };
  const auto refused = [&](const char* text, auto&& call) { CHECK(says(error_of(call), text)); };
  refused("memory type 9 is unknown; 0 to 4", [&] { a.registerMemory({{memory.data(), 64, 0, kind}}); });
  refused("memory type 9 is unknown", [&] { a.prepareDescs("", Descs(kind)); });
  refused("memory type 9 is unknown", [&] { a.prepareTransfer(OpType::READ, {{nullptr, 1, 0, kind}}, mine, "a"); });
  refused("operation 7 is unknown", [&] { a.prepareTransfer(static_cast<OpType>(7), mine, mine, "a"); });
  refused("backend number 99 was not created", [&] { a.registerDescs(Descs(), {99}); });
  refused("backend number 0 is none", [&] { a.queryMemory(Descs(), 0); });
  Descs uneven;
  uneven.addr = Column(3, 0);
  uneven.len = Column(1, 64);
  refused("columns of 3 addresses, 1 lengths, 0 devices", [&] { a.registerDescs(uneven); });
  Descs texts(MemType::FILE);
  texts.add(0, 1, 0);
  texts.add(0, 1, 1);
  texts.meta = {"one"};
  refused("1 texts", [&] { a.queryMemory(texts, 1); });
}

TEST(handles_outlive_their_agent) {
  char buffer[64];
  std::vector<MemDescriptor> descs = {{buffer, 64, 0}};
  XferHandle x;
  RegHandle reg;
  {
    Agent a("a", loopback({{"delay_us", "1000000"}}));
    reg = a.registerMemory(descs);
    x = a.prepareTransfer(OpType::WRITE, descs, descs, "a");
    a.postTransfer(x);
    const XferHandle copy = x;
  }
  Agent other("a", loopback());
  CHECK_EQ(error_of([&] { other.checkTransfer(x); }).code(), -6);
  other.releaseTransfer(x);
  other.deregisterMemory(reg);
}

TEST(repost_while_running_and_cancel) {
  Agent a("a", loopback({{"delay_us", "1000000"}}));
  std::vector<char> buffer(64, 'x');
  std::vector<MemDescriptor> from = {{buffer.data(), 32, 0}}, to = {{buffer.data() + 32, 32, 0}},
                             all = {{buffer.data(), 64, 0}};
  auto reg = a.registerMemory(all);
  auto x = a.prepareTransfer(OpType::WRITE, from, to, "a");
  CHECK_EQ(error_of([&] { a.checkTransfer(x); }).code(), -1);
  CHECK(a.postTransfer(x) == XferState::PROC);
  CHECK_EQ(error_of([&] { a.postTransfer(x); }).code(), -7);
  a.releaseTransfer(x);
  auto y = a.prepareTransfer(OpType::WRITE, from, to, "a", "", "to myself");
  a.postTransfer(y);
  CHECK(a.waitTransfer(y, std::chrono::milliseconds(10)) == XferState::PROC);
  CHECK(a.waitTransfer(y, std::chrono::seconds(5)) == XferState::DONE);
  CHECK_EQ(a.getNewNotifs()["a"].at(0), "to myself");
}

TEST(lost_peer) {
  auto b = std::make_unique<Agent>("b", loopback());
  Agent a("a", loopback());
  char here[64], there[64];
  std::vector<MemDescriptor> mine = {{here, 64, 0}}, theirs = {{there, 64, 0}};
  auto reg = a.registerMemory(mine);
  b->registerMemory(theirs);
  a.addRemoteAgent(b->getMetadata());
  auto x = a.prepareTransfer(OpType::WRITE, mine, theirs, "b");
  a.postTransfer(x);
  finish(a, x);
  b.reset();
  CHECK_EQ(error_of([&] { a.postTransfer(x); }).code(), -10);
  CHECK_EQ(error_of([&] { a.postTransfer(x); }).code(), -4);
  CHECK(!a.checkRemoteMetadata("b"));
  b = std::make_unique<Agent>("b", loopback());
  b->registerMemory(theirs);
  a.addRemoteAgent(b->getMetadata());
  auto y = a.prepareTransfer(OpType::WRITE, mine, theirs, "b");
  a.postTransfer(y);
  finish(a, y);
}

TEST(event_descriptor) {
  Pair pair;
  const int fd = pair.b.eventFd();
  std::uint64_t drained;
  pollfd waiting{fd, POLLIN, 0};
  CHECK_EQ(poll(&waiting, 1, 1000), 1);
  CHECK_EQ(read(fd, &drained, 8), 8);
  CHECK_EQ(poll(&waiting, 1, 0), 0);
  pair.a.sendNotif("b", "wake up");
  CHECK_EQ(poll(&waiting, 1, 5000), 1);
  CHECK_EQ(pair.b.getNewNotifs()["a"].at(0), "wake up");
}

TEST(eight_threads_share_one_agent) {
  Pair pair(loopback({{"max_running", "4"}, {"delay_us", "20"}}));
  std::vector<char> far(1 << 16);
  std::vector<MemDescriptor> theirs = {{far.data(), far.size(), 0}};
  pair.b.registerMemory(theirs);
  pair.a.addRemoteAgent(pair.b.getMetadata());
  std::atomic<int> failures{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      std::vector<char> mine(4096, static_cast<char>(t));
      for (int round = 0; round < 60; ++round) {
        std::vector<MemDescriptor> here = {{mine.data(), mine.size(), 0}}, there = {{far.data() + t * 4096, 4096, 0}};
        auto reg = pair.a.registerMemory(here);
        auto x = pair.a.prepareTransfer(OpType::WRITE, here, there, "b", "", "t" + std::to_string(t));
        pair.a.postTransfer(x);
        if (round % 3 == 0 && pair.a.waitTransfer(x, std::chrono::seconds(10)) != XferState::DONE) ++failures;
        if (round % 3 == 1) finish(pair.a, x);
        pair.a.releaseTransfer(x);
        pair.a.deregisterMemory(reg);
        pair.b.getNewNotifs();
        pair.a.sendNotif("b", "side");
        if (t == 0 && round % 10 == 0) pair.a.addRemoteAgent(pair.b.getMetadata());
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK_EQ(failures.load(), 0);
}

// Order between metadata rests on it: what one revision tells of does not depend on when it was asked for.
TEST(metadata_of_one_revision_is_the_same) {
  Agent b("b", loopback());
  std::vector<char> memory(4096);
  std::vector<MemDescriptor> descs = {{memory.data(), memory.size(), 0}};
  std::atomic<bool> over{false};
  std::thread changes([&] {
    while (!over) b.deregisterMemory(b.registerMemory(descs));
  });
  constexpr std::size_t kRevisionAt = 24 + 4 + 1 + 8;  // docs/wire.md: header, name, incarnation
  std::map<std::uint64_t, std::size_t> sizes;
  std::uint64_t last = 0;
  while (sizes.size() < 1000) {  // ctest's limit ends a count that stands still
    const std::string bytes = b.getMetadata();
    std::uint64_t revision;
    std::memcpy(&revision, bytes.data() + kRevisionAt, sizeof revision);
    CHECK(revision >= last);
    last = revision;
    const auto [known, added] = sizes.emplace(revision, bytes.size());
    CHECK_EQ(known->second, bytes.size());
    const auto before = std::prev(known, known != sizes.begin());
    CHECK(before == known || before->first + 1 < revision ||
          before->second != bytes.size());  // each change is a revision
  }
  over = true;
  changes.join();
}

TEST(every_documented_backend_is_reported) {
  const char* kNames[] = {"UCX",   "UCX_MO", "GPUNETIO", "Mooncake", "LIBFABRIC",  "GDS",  "GDS_MT",
                          "POSIX", "HF3FS",  "OBJ",      "GUSLI",    "AZURE_BLOB", "UCCL", "INFINIA"};
  const auto list = listBackends();
  for (const char* name : kNames) {
    bool found = false;
    for (const BackendInfo& info : list)
      if (info.name == name) {
        found = true;
        CHECK(info.available || !info.reason.empty());
        CHECK(!info.mems.empty());
      }
    if (!found) check::failed(__FILE__, __LINE__, name);
  }
}

int main(int argc, char** argv) {
  setenv("NIXL_LOOPBACK", "y", 1);
#if defined(__SANITIZE_THREAD__)
  setenv("UCX_MEM_EVENTS", "n", 1);  // UCX's memory hooks run in ending threads, which the sanitizer has left already
#endif
  return check::run_tests(argc, argv);
}
