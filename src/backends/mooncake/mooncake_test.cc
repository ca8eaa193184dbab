// What the conformance suite does not ask of Mooncake: its library, its parameters, memory registered in overlapping pieces, long lists,
// an engine that fails, peers that go, come back or are none.
#include "backends/mooncake/mooncake.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <vector>

#include "backends/mooncake/options.h"
#include "backends/mooncake/parts.h"
#include "backends/mooncake/wire.h"
#include "base/clock.h"
#include "check.h"
#include "fuzz.h"
#include "net/tcp.h"
#include "plans.h"

using namespace nixl::core;

namespace {

constexpr Nanoseconds kPatience = 20'000'000'000;

bool has(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}
const BackendEntry& entry() {
  return backends_of_mooncake()[0];
}

struct Lost final : Events {
  void peer_lost(const PeerId&, Error) noexcept override { ++count; }
  void peer_left(const PeerId&, Error) noexcept override { ++num_left; }
  std::atomic<int> count{0}, num_left{0};
};

struct Node {
  explicit Node(const char* name, std::uint64_t incarnation, Params over = {}) : id{name, incarnation} {
    BackendConfig config;
    config.self = id;
    config.params = entry().params;
    for (const auto& [key, value] : over) config.params[key] = value;
    config.events = &lost;
    backend = std::move(*CHECK_OK(entry().open(std::move(config))));
  }
  std::unique_ptr<Connection> connect(Node& peer) {
    return std::move(*CHECK_OK(backend->connect(peer.id, *CHECK_OK(peer.backend->export_connection()))));
  }
  PeerId id;
  Lost lost;
  std::unique_ptr<Backend> backend;
};

Region dram(const void* start, std::size_t bytes) {
  return {MemKind::kDram, reinterpret_cast<std::uint64_t>(start), bytes, 0, ""};
}
template <typename Condition>
void until(Condition condition) {
  const Deadline deadline = Deadline::after(kPatience);
  while (!condition()) {
    CHECK(!deadline.passed());
    ::usleep(200);
  }
}

// Two nodes with a buffer each, the far one imported here.
struct Pair {
  explicit Pair(std::size_t size) : bytes(size), here_memory(size, 'h'), there_memory(size, 't') {
    mine = std::move(*CHECK_OK(here.backend->add_region(dram(here_memory.data(), bytes))));
    const Region region = dram(there_memory.data(), bytes);
    theirs = std::move(*CHECK_OK(there->backend->add_region(region)));
    line = here.connect(*there);
    remote = std::move(
        *CHECK_OK(here.backend->import_region(*line, region, *CHECK_OK(there->backend->export_region(*theirs)))));
    CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
  }
  ~Pair() {
    ::unsetenv("STAND_IN_FAULT");
    transfer.reset();
    remote.reset();
    line.reset();
    mine.reset();
    theirs.reset();
  }
  // All bytes in `pieces`, in reverse order so that none can be joined.
  void prepare(Op op, std::size_t pieces) {
    Plan plan = test::plan_between(op, *line, *mine, *remote);
    const std::size_t size = bytes / pieces;
    for (std::size_t i = pieces; i-- > 0;)
      test::add_block(plan, reinterpret_cast<std::uint64_t>(here_memory.data()) + i * size,
                      reinterpret_cast<std::uint64_t>(there_memory.data()) + i * size, size);
    transfer = std::move(*CHECK_OK(here.backend->prepare(std::move(plan))));
  }
  Result<TransferState> run(std::optional<std::string_view> message = {}) {
    const Deadline deadline = Deadline::after(kPatience);
    auto state = transfer->submit(message);
    while (!state && state.error().code == Code::kAgain && !deadline.passed()) state = transfer->submit(message);
    while (state && *state == TransferState::kRunning) {
      if (deadline.passed()) return fail(Code::kTimeout, "still running");
      state = transfer->poll();
    }
    return state;
  }
  std::string error_of_run() {
    const auto state = run();
    CHECK(!state);
    return state.error().reason;
  }
  const std::size_t bytes;
  std::vector<char> here_memory, there_memory;
  Node here{"here", 1};
  std::unique_ptr<Node> there = std::make_unique<Node>("there", 2);
  std::unique_ptr<LocalRegion> mine, theirs;
  std::unique_ptr<Connection> line;
  std::unique_ptr<RemoteRegion> remote;
  std::unique_ptr<Transfer> transfer;
};

}  // namespace

// First of all: libraries are opened once a process.
TEST(without_the_library) {
  check::in_child([] {
    ::setenv("NIXL_MOONCAKE_LIBRARY", "/nonexistent/libtransfer_engine.so", 1);
    const Probe probe = entry().probe();
    CHECK(!probe.viable && has(probe.reason, "libtransfer_engine.so") && has(probe.reason, "NIXL_MOONCAKE_LIBRARY"));
    CHECK(has(probe.reason, "/nonexistent/libtransfer_engine.so: cannot open shared object file"));
    BackendConfig config;
    config.params = entry().params;
    const auto opened = entry().open(std::move(config));
    CHECK(!opened && opened.error().code == Code::kUnsupported);
  });
  check::in_child([] {
    ::setenv("NIXL_MOONCAKE_LIBRARY", "libm.so.6", 1);
    CHECK(has(entry().probe().reason, "createTransferEngine"));
  });
}

TEST(gpu_memory_needs_an_engine_with_cuda) {
  const Probe probe = entry().probe();
  CHECK(probe.viable && !probe.kinds.has(MemKind::kVram) && has(probe.reason, "without CUDA"));
  Node node("here", 1);
  Region gpu = dram(&node, 64);
  gpu.kind = MemKind::kVram;
  const auto added = node.backend->add_region(gpu);
  CHECK(!added && added.error().code == Code::kInvalidArgument);
}

TEST(parameters) {
  const std::string folder = std::filesystem::temp_directory_path() / ("nixl_rdma_" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder + "/mlx5_0");
  std::filesystem::create_directories(folder + "/mlx5_1");
  const mooncake::Machine with{folder}, without{"/nonexistent"};
  const auto protocol = [](Params params, const mooncake::Machine& machine) {
    return CHECK_OK(mooncake::engine_options(params, machine))->protocol;
  };
  CHECK_EQ(protocol({}, without), "tcp");
  CHECK_EQ(protocol({{"protocol", "auto"}}, with), "rdma");
  CHECK_EQ(protocol({{"protocol", "tcp"}}, with), "tcp");
  const auto named = mooncake::engine_options({{"mooncake_devices", "mlx5_1, mlx5_0"}}, with);
  CHECK(named && named->protocol == "rdma" && named->devices == (std::vector<std::string>{"mlx5_1", "mlx5_0"}));
  struct Wrong {
    Params params;
    const mooncake::Machine& machine;
    const char *first, *second;
  };
  for (const Wrong& wrong : {Wrong{{{"protocol", "udp"}}, with, "protocol", "auto, tcp or rdma"},
                             Wrong{{{"protocol", "rdma"}}, without, "protocol", "/nonexistent"},
                             Wrong{{{"mooncake_devices", "mlx5_7"}}, with, "mlx5_7", "mlx5_0, mlx5_1"},
                             Wrong{{{"mooncake_devices", "mlx5_0"}, {"protocol", "tcp"}}, with, "mlx5_0", "tcp"}}) {
    const auto refused = mooncake::engine_options(wrong.params, wrong.machine);
    CHECK(!refused && refused.error().code == Code::kInvalidArgument);
    CHECK(has(refused.error().reason, wrong.first) && has(refused.error().reason, wrong.second));
  }
  ::setenv("NIXL_MOONCAKE_IP_ADDR", "some.host", 1);
  CHECK(has(mooncake::engine_options({}, without).error().reason, "NIXL_MOONCAKE_IP_ADDR"));
  ::unsetenv("NIXL_MOONCAKE_IP_ADDR");
  CHECK_OK(mooncake::own_address());
  ::setenv("NIXL_MOONCAKE_IP_ADDR", "127.0.0.1", 1);
  std::filesystem::remove_all(folder);
}

TEST(memory_is_registered_once_however_regions_overlap) {
  const auto api = CHECK_OK(mooncake::Api::load());
  const auto engine = std::move(*CHECK_OK(mooncake::Engine::open(**api, {"tcp", "127.0.0.1", {}})));
  mooncake::Parts parts(*engine);
  const auto add = [&](std::uint64_t start, std::uint64_t end) {
    return *CHECK_OK(parts.add({MemKind::kDram, start, end - start, 0, ""}));
  };
  using Starts = std::vector<std::uint64_t>;
  const auto middle = add(2000, 3000);
  CHECK(middle.starts() == Starts{2000});
  const auto around = add(1000, 4000);
  CHECK(around.starts() == (Starts{1000, 2000, 3000}));
  CHECK_EQ(around.within(1500, 9000), 500u);
  CHECK_EQ(around.within(2000, 900), 900u);
  CHECK_EQ(around.within(3500, 500), 500u);
  parts.remove(middle);
  const auto across = add(2500, 5000);  // the middle is still used
  CHECK(across.starts() == (Starts{2000, 3000, 4000}));
  parts.remove(around);
  parts.remove(across);
  CHECK(add(500, 6000).starts() == Starts{500});  // all were given back
  parts.remove(mooncake::Cuts(Starts{500}));
  ::setenv("STAND_IN_FAULT", "memory", 1);
  const auto refused = parts.add({MemKind::kDram, 1000, 10, 0, ""});
  CHECK(!refused && has(refused.error().reason, "registerLocalMemory of 10 bytes at 0x3e8 (*) answered -1"));
  ::unsetenv("STAND_IN_FAULT");
}

TEST(copies_cross_no_border_between_parts) {
  Pair pair(3000);
  // The far buffer again, as a region that two pieces registered earlier are parts of, on a node of its own.
  Node other("other", 3);
  std::vector<char> memory(3000, 'o');
  auto first = std::move(*CHECK_OK(other.backend->add_region(dram(memory.data() + 1000, 500))));
  const Region whole = dram(memory.data(), 3000);
  auto region = std::move(*CHECK_OK(other.backend->add_region(whole)));
  auto line = pair.here.connect(other);
  auto remote = std::move(
      *CHECK_OK(pair.here.backend->import_region(*line, whole, *CHECK_OK(other.backend->export_region(*region)))));
  Plan plan = test::plan_between(Op::kWrite, *line, *pair.mine, *remote);
  test::add_block(plan, reinterpret_cast<std::uint64_t>(pair.here_memory.data()), whole.address, 3000);
  pair.transfer = std::move(*CHECK_OK(pair.here.backend->prepare(std::move(plan))));
  CHECK_OK(pair.run());  // the stand-in takes no copy out of two registrations
  CHECK(memory == pair.here_memory);
  pair.transfer.reset();
}

TEST(damaged_bytes_do_no_harm) {
  const std::string contact = mooncake::Contact{9, "127.0.0.1", 80, "127.0.0.1:81", "tcp"}.encode();
  CHECK_EQ(CHECK_OK(mooncake::Contact::decode(contact))->segment, "127.0.0.1:81");
  check::fuzz(contact, [](const std::string& bytes) {
    if (const auto read = mooncake::Contact::decode(bytes))
      CHECK(mooncake::is_numeric_address(read->address) && read->port != 0);
  });
  const std::string hello = mooncake::Hello{{"caller", 5}, 6}.encode();
  CHECK_EQ(CHECK_OK(mooncake::Hello::decode(hello))->caller.name, "caller");
  check::fuzz(hello, [](const std::string& bytes) { (void)mooncake::Hello::decode(bytes); });
  const Region region{MemKind::kDram, 1500, 2000, 0, ""};
  check::fuzz(mooncake::Cuts({1000, 2000, 3000}).encode(), [&](const std::string& bytes) {
    const auto cuts = mooncake::Cuts::decode(bytes, region);
    if (!cuts) return;
    for (std::uint64_t at = 1500, steps = 0; at < 3500; ++steps) {
      const std::uint64_t piece = cuts->within(at, 3500 - at);
      CHECK(piece > 0 && piece <= 3500 - at && steps < 1000);
      at += piece;
    }
  });
}

TEST(long_lists_go_in_batches) {
  Pair pair(64 * 5000);
  for (const std::size_t pieces : {1024u, 1025u, 5000u}) {
    std::fill(pair.here_memory.begin(), pair.here_memory.end(), static_cast<char>(pieces));
    pair.prepare(Op::kWrite, pieces);
    CHECK_OK(pair.run());  // the stand-in ends the program at more than 1024 under way
    CHECK(!std::memcmp(pair.there_memory.data(), pair.here_memory.data(), pieces * (pair.bytes / pieces)));
  }
  CHECK_EQ(pair.transfer->path(), "mooncake/tcp");
}

TEST(transfers_share_what_the_engine_takes) {
  Pair pair(64 * 3000);
  pair.prepare(Op::kWrite, 3000);
  auto first = std::move(pair.transfer);
  pair.prepare(Op::kRead, 3000);
  CHECK_OK(first->submit({}));
  CHECK_OK(pair.run());
  until([&] { return *CHECK_OK(first->poll()) == TransferState::kDone; });
}

TEST(an_engine_that_fails) {
  Pair pair(64 * 300);
  pair.prepare(Op::kWrite, 300);
  for (const char* fault : {"refuse", "half"}) {
    ::setenv("STAND_IN_FAULT", fault, 1);
    CHECK(has(pair.error_of_run(), "submitTransfer of 256 requests answered -1"));
  }
  ::setenv("STAND_IN_FAULT", "fail", 1);
  const std::string why = pair.error_of_run();
  CHECK(has(why, "FAILED (6)") && has(why, "'there'"));
  ::setenv("STAND_IN_FAULT", "stall", 1);
  CHECK_OK(pair.transfer->submit("never sent"));
  CHECK(!pair.transfer->cancel());
  ::unsetenv("STAND_IN_FAULT");
  until([&] { return pair.transfer->cancel(); });
  CHECK(pair.transfer->poll().error().code == Code::kCancelled);
  CHECK_OK(pair.run("sent"));
  std::vector<Notification> seen;
  until([&] {
    pair.there->backend->notifier()->drain(seen);
    return !seen.empty();
  });
  CHECK(seen.size() == 1 && seen[0].message == "sent" && seen[0].sender == "here");
  ::setenv("STAND_IN_FAULT", "engine", 1);
  BackendConfig config;
  config.params = entry().params;
  const auto none = entry().open(std::move(config));
  CHECK(!none && none.error().code == Code::kIo && has(none.error().reason, "createTransferEngine"));
}

TEST(memory_that_the_peer_has_taken_back) {
  Pair pair(4096);
  pair.prepare(Op::kRead, 1);
  CHECK_OK(pair.run());
  pair.theirs.reset();
  const auto state = pair.run();
  CHECK(!state && state.error().code == Code::kIo);
  CHECK(pair.here.lost.count == 0);
}

TEST(a_peer_that_leaves_and_one_that_comes_back) {
  Pair pair(4096);
  pair.prepare(Op::kWrite, 1);
  CHECK_OK(pair.run());
  pair.theirs.reset();
  pair.there.reset();
  until([&] { return pair.here.lost.num_left == 1; });
  const auto state = pair.run();
  CHECK(!state && state.error().code == Code::kPeerLost && has(state.error().reason, "closed its backend"));
  CHECK(pair.here.backend->notifier()->send(*pair.line, "x").error().code == Code::kPeerLost);
  pair.transfer.reset();
  pair.remote.reset();
  pair.line.reset();
  Node again("there", 4);
  const Region region = dram(pair.there_memory.data(), pair.bytes);
  pair.theirs = std::move(*CHECK_OK(again.backend->add_region(region)));
  pair.line = pair.here.connect(again);
  pair.remote = std::move(*CHECK_OK(
      pair.here.backend->import_region(*pair.line, region, *CHECK_OK(again.backend->export_region(*pair.theirs)))));
  std::fill(pair.here_memory.begin(), pair.here_memory.end(), 'n');
  pair.prepare(Op::kWrite, 1);
  CHECK_OK(pair.run());
  CHECK(pair.there_memory == pair.here_memory);
  CHECK_EQ(pair.here.lost.count.load(), 0);
  pair.transfer.reset();
  pair.remote.reset();
  pair.line.reset();
  pair.theirs.reset();
}

// The engine does not let go of what is under way to a peer that is gone.
TEST(a_peer_that_is_gone_holds_nobody_for_ever) {
  Pair pair(4096);
  pair.prepare(Op::kRead, 1);
  CHECK_OK(pair.run());
  ::setenv("STAND_IN_FAULT", "stall", 1);
  CHECK_OK(pair.transfer->submit({}));
  pair.theirs.reset();
  pair.there.reset();
  const Nanoseconds start = now_ns();
  until([&] { return pair.here.lost.num_left == 1; });
  CHECK(*CHECK_OK(pair.transfer->poll()) == TransferState::kRunning && !pair.transfer->cancel());
  until([&] { return !pair.transfer->poll(); });
  CHECK(pair.transfer->poll().error().code == Code::kPeerLost && now_ns() - start < 8'000'000'000);
  CHECK(pair.transfer->cancel());
  ::unsetenv("STAND_IN_FAULT");
  pair.here.backend->progress();  // takes back what the engine has let go of at last
}

TEST(last_words_come_before_the_end) {
  for (int round = 0; round < 20; ++round) {
    Node here("here", 1);
    auto there = std::make_unique<Node>("there", 2);
    auto line = here.connect(*there);
    CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
    auto back = there->connect(here);
    CHECK_OK(back->wait_ready(Deadline::after(kPatience)));
    CHECK_OK(there->backend->notifier()->send(*back, std::string(1 << 20, 'w')));
    back.reset();
    there.reset();
    until([&] { return here.lost.num_left == 1; });
    std::vector<Notification> seen;
    here.backend->notifier()->drain(seen);
    CHECK_EQ(seen.size(), 1u);
  }
}

TEST(without_descriptors_callers_wait) {
  check::in_child([] {
    Node here("here", 1), there("there", 2);
    const auto contact = CHECK_OK(mooncake::Contact::decode(*CHECK_OK(there.backend->export_connection())));
    rlimit before{};
    CHECK(::getrlimit(RLIMIT_NOFILE, &before) == 0);
    const int next = ::dup(0);
    ::close(next);
    rlimit few = before;
    few.rlim_cur = static_cast<rlim_t>(next) + 1;  // one more, for our own end
    CHECK(::setrlimit(RLIMIT_NOFILE, &few) == 0);
    const Fd caller =
        std::move(*CHECK_OK(net::connect_tcp({contact->address, contact->port}, Deadline::after(kPatience))));
    const std::clock_t start = std::clock();
    ::usleep(300'000);
    CHECK(std::clock() - start < CLOCKS_PER_SEC / 10);  // nobody spins
    CHECK(::setrlimit(RLIMIT_NOFILE, &before) == 0);
    auto line = here.connect(there);
    CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
  });
}

TEST(somebody_else_at_the_same_address) {
  Node here("here", 1), there("there", 2);
  auto line = std::move(*CHECK_OK(here.backend->connect({"there", 7}, [&] {
    std::string bytes = *CHECK_OK(there.backend->export_connection());
    bytes[6] = 7;  // of the incarnation
    return bytes;
  }())));
  CHECK(line->wait_ready(Deadline::after(kPatience)).error().code == Code::kPeerLost);
  until([&] { return here.lost.count == 1; });
}

TEST(an_own_message_too_long) {
  Pair pair(64);
  const std::string text((64 << 20) + 1, 'x');
  const auto sent = pair.here.backend->notifier()->send(*pair.line, text);
  CHECK(!sent && sent.error().code == Code::kInvalidArgument && has(sent.error().reason, "67108864"));
}

TEST(messages_leave_before_a_connection_closes) {
  Node there("there", 2);
  {
    Node here("here", 1);
    auto line = here.connect(there);
    CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
    for (int i = 0; i < 100; ++i) CHECK_OK(here.backend->notifier()->send(*line, std::string(100'000, 'm')));
  }
  std::vector<Notification> seen;
  until([&] {
    there.backend->notifier()->drain(seen);
    return seen.size() == 100;
  });
}

TEST(protocols_must_agree) {
  Node here("here", 1), there("there", 2);
  std::string bytes = *CHECK_OK(there.backend->export_connection());
  bytes.replace(bytes.size() - 3, 3, "udp");
  const auto line = here.backend->connect({"there", 2}, bytes);
  CHECK(!line && line.error().code == Code::kUnsupported && has(line.error().reason, "udp"));
}

int main(int argc, char** argv) {
  ::setenv("NIXL_MOONCAKE_LIBRARY", STAND_IN_MOONCAKE, 1);
  ::setenv("NIXL_MOONCAKE_IP_ADDR", "127.0.0.1", 1);
  return check::run_tests(argc, argv);
}
