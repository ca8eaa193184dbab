#include "conformance/backend_suite.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <random>

#include "check.h"
#include "plans.h"

namespace nixl::core::conformance {
namespace {

constexpr Nanoseconds kPatience = 20'000'000'000;

struct Lost final : Events {
  void peer_lost(const PeerId&, Error) noexcept override { ++count; }
  std::atomic<int> count{0};
};

std::string pattern(std::size_t size, unsigned seed) {
  std::string bytes(size, '\0');
  std::mt19937_64 random(seed);
  std::size_t at = 0;
  for (; at + 8 <= size; at += 8) {
    const std::uint64_t word = random();
    std::memcpy(bytes.data() + at, &word, 8);
  }
  for (; at < size; ++at) bytes[at] = static_cast<char>(random());
  return bytes;
}
std::uint64_t address_of(const std::string& buffer) {
  return reinterpret_cast<std::uint64_t>(buffer.data());
}

// One backend instance under the name of an agent.
struct Node {
  Node(const BackendCase& which, const std::string& agent, std::uint64_t incarnation) : id{agent, incarnation} {
    BackendConfig config;
    config.self = id;
    config.params = which.entry->params;
    for (const auto& [key, value] : which.params) config.params[key] = value;
    config.progress_thread = false;
    config.events = &lost;
    backend = std::move(*CHECK_OK(which.entry->open(std::move(config))));
  }
  std::unique_ptr<Connection> connect(Node& peer) {
    const std::string bytes = *CHECK_OK(peer.backend->export_connection());
    return std::move(*CHECK_OK(backend->connect(peer.id, bytes)));
  }
  PeerId id;
  Lost lost;
  std::unique_ptr<Backend> backend;
};

Region dram(const std::string& buffer) {
  return {MemKind::kDram, address_of(buffer), buffer.size(), 0, ""};
}

// A local buffer and a target of the same size with everything between them, for either family of backends.
struct Link {
  Link(const BackendCase& backend_case, std::size_t size) : which(backend_case), local_bytes(size, 'L') {
    static std::atomic<std::uint64_t> incarnations{1};
    here = std::make_unique<Node>(which, "here", incarnations++);
    if (which.make_target) {
      target = which.make_target(size);
      there_region = target->region();
      remote_owner = std::move(*CHECK_OK(here->backend->add_region(there_region)));
      line = here->connect(*here);
      remote = std::move(*CHECK_OK(here->backend->loopback_region(*line, there_region, *remote_owner)));
    } else {
      there = std::make_unique<Node>(which, "there", incarnations++);
      remote_bytes.assign(size, 'R');
      there_region = dram(remote_bytes);
      remote_owner = std::move(*CHECK_OK(there->backend->add_region(there_region)));
      line = here->connect(*there);
      const std::string key = *CHECK_OK(there->backend->export_region(*remote_owner));
      remote = std::move(*CHECK_OK(here->backend->import_region(*line, there_region, key)));
    }
    local = std::move(*CHECK_OK(here->backend->add_region(dram(local_bytes))));
  }
  ~Link() {
    transfer.reset();
    remote.reset();
    line.reset();
    local.reset();
    remote_owner.reset();
  }

  std::string contents() { return target ? target->contents().substr(0, local_bytes.size()) : remote_bytes; }
  void set_contents(const std::string& bytes) {
    if (target)
      target->set_contents(bytes);
    else
      std::memcpy(remote_bytes.data(), bytes.data(), bytes.size());
  }
  void drive() {
    here->backend->progress();
    if (there) there->backend->progress();
  }
  Plan plan(Op op) {
    Plan plan = test::plan_between(op, *line, *local, *remote);
    plan.remote_kind = there_region.kind;
    return plan;
  }
  void add(Plan& plan, std::size_t local_at, std::size_t remote_at, std::size_t size) {
    test::add_block(plan, address_of(local_bytes) + local_at, there_region.address + remote_at, size);
  }
  void prepare(Plan plan) { transfer = std::move(*CHECK_OK(here->backend->prepare(std::move(plan)))); }
  Result<TransferState> submit(std::optional<std::string_view> message = {}) {
    const Deadline deadline = Deadline::after(kPatience);
    for (;;) {
      auto state = transfer->submit(message);
      if (state || state.error().code != Code::kAgain || deadline.passed()) return state;
      drive();
    }
  }
  Result<TransferState> finish() {
    const Deadline deadline = Deadline::after(kPatience);
    for (;;) {
      auto state = transfer->poll();
      if (!state || *state == TransferState::kDone) return state;
      if (deadline.passed()) return fail(Code::kTimeout, "still running after %lld s", kPatience / 1'000'000'000ll);
      drive();
    }
  }
  void run(std::optional<std::string_view> message = {}) {
    CHECK_OK(submit(message));
    CHECK_OK(finish());
  }

  const BackendCase& which;
  std::string local_bytes, remote_bytes;
  std::unique_ptr<Node> here, there;
  std::unique_ptr<Target> target;
  Region there_region;
  std::unique_ptr<LocalRegion> local, remote_owner;
  std::unique_ptr<Connection> line;
  std::unique_ptr<RemoteRegion> remote;
  std::unique_ptr<Transfer> transfer;
};

void check_same(const std::string& seen, const std::string& expected) {
  CHECK_EQ(seen.size(), expected.size());
  if (seen == expected) return;  // quick, also under a sanitizer
  const auto differs = std::mismatch(seen.begin(), seen.end(), expected.begin()).first;
  if (differs != seen.end()) {
    std::fprintf(stderr, "first difference at byte %zd of %zu\n", differs - seen.begin(), seen.size());
    CHECK(seen == expected);
  }
}

void abilities_are_true(const BackendCase& which) {
  Link link(which, 4096);
  const Abilities& seen = link.here->backend->abilities();
  CHECK_EQ(seen.remote, which.entry->remote);
  CHECK_EQ(seen.local, which.entry->local);
  CHECK_EQ(link.here->backend->notifier() != nullptr, which.entry->notifications);
  CHECK(seen.local_kinds.has(MemKind::kDram));
  CHECK(seen.remote_kinds.has(link.there_region.kind));
  CHECK((seen.registrable() | which.entry->kinds) == which.entry->kinds);
  CHECK(!seen.remote || link.here->backend->notifier());
}

void regions_come_and_go(const BackendCase& which) {
  Link link(which, 1 << 16);
  for (int i = 0; i < 10'000; ++i) CHECK_OK(link.here->backend->add_region(dram(link.local_bytes)));
  link.local_bytes.replace(0, 1 << 16, pattern(1 << 16, 1));  // in place: this memory is registered
  Plan plan = link.plan(Op::kWrite);
  link.add(plan, 0, 0, 1 << 16);
  link.prepare(std::move(plan));
  link.run();
  check_same(link.contents(), link.local_bytes);
}

void sizes_and_odd_offsets(const BackendCase& which) {
  for (const std::size_t size : {1ul, 3ul, 64ul, 4095ul, 4096ul, 65'537ul, (1ul << 20) + 1, 64ul << 20}) {
    if (size > which.max_bytes) continue;
    const std::size_t odd = which.alignment == 1 ? 7 : which.alignment;
    Link link(which, size + odd);
    std::string expected = pattern(size + odd, 2);
    link.set_contents(expected);
    const std::string sent = pattern(size + odd, 3);
    std::memcpy(link.local_bytes.data(), sent.data(), sent.size());
    Plan plan = link.plan(Op::kWrite);
    if (which.whole_targets) {
      link.add(plan, 0, 0, size + odd);
      expected = sent;
    } else {
      link.add(plan, 3 % odd, odd, size);
      expected.replace(odd, size, sent, 3 % odd, size);
    }
    link.prepare(std::move(plan));
    link.run();
    check_same(link.contents(), expected);

    plan = link.plan(Op::kRead);
    link.add(plan, 0, odd, size);
    link.prepare(std::move(plan));
    link.run();
    check_same(link.local_bytes.substr(0, size), expected.substr(odd, size));
    check_same(link.local_bytes.substr(size), sent.substr(size));
    CHECK(!link.transfer->path().empty());
  }
}

void lists(const BackendCase& which) {
  const std::size_t block = std::max<std::size_t>(which.alignment, 48);
  for (const std::size_t count : {1ul, 7ul, 1000ul, 10'000ul}) {
    if (count > which.max_blocks) continue;
    Link link(which, count * block);
    const std::string sent = pattern(count * block, 4);
    std::memcpy(link.local_bytes.data(), sent.data(), sent.size());
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(5));
    for (const Op op : {Op::kWrite, Op::kRead}) {
      Plan plan = link.plan(op);
      for (std::size_t i = 0; i < count; ++i) link.add(plan, i * block, order[i] * block, block);
      link.prepare(std::move(plan));
      link.run();
      if (op == Op::kWrite) {
        const std::string stored = link.contents();
        for (std::size_t i = 0; i < count; ++i)
          CHECK(!std::memcmp(stored.data() + order[i] * block, sent.data() + i * block, block));
        std::fill(link.local_bytes.begin(), link.local_bytes.end(), '?');
      } else {
        check_same(link.local_bytes, sent);
      }
    }
  }
}

void strided_runs(const BackendCase& which) {
  const std::size_t block = std::max<std::size_t>(which.alignment, 32), count = 100;
  Link link(which, 4 * block * count);
  const std::string sent = pattern(link.local_bytes.size(), 6);
  std::memcpy(link.local_bytes.data(), sent.data(), sent.size());
  std::string expected(link.local_bytes.size(), 'R');
  link.set_contents(expected);
  Plan plan = link.plan(Op::kWrite);
  link.add(plan, 0, block, block);                              // count blocks, every third to every second place
  link.add(plan, 3 * block * count, 3 * block * count, block);  // a run of one
  plan.count = {count, 1};
  plan.local_stride = {3 * block, 0};
  plan.remote_stride = {2 * block, 0};
  plan.num_blocks = count + 1;
  plan.total_bytes = (count + 1) * block;
  link.prepare(std::move(plan));
  link.run();
  for (std::size_t i = 0; i < count; ++i) expected.replace(block + 2 * i * block, block, sent, 3 * i * block, block);
  expected.replace(3 * block * count, block, sent, 3 * block * count, block);
  check_same(link.contents(), expected);
}

void reposts(const BackendCase& which) {
  Link link(which, 1 << 16);
  const std::size_t size = 1 << 15;
  Plan plan = link.plan(Op::kWrite);
  link.add(plan, 0, 0, size);
  link.prepare(std::move(plan));
  for (int i = 0; i < 1000; ++i) {
    std::memset(link.local_bytes.data(), i, size);
    link.run();
    if (i % 100 == 99) check_same(link.contents().substr(0, size), std::string(size, static_cast<char>(i)));
  }
}

void cancel_leaves_memory_alone(const BackendCase& which) {
  const std::size_t size = std::min<std::size_t>(which.max_bytes, 16 << 20);
  Link link(which, size);
  link.set_contents(pattern(size, 7));
  for (int round = 0; round < 20; ++round) {
    Plan plan = link.plan(Op::kRead);
    link.add(plan, 0, 0, size);
    link.prepare(std::move(plan));
    CHECK_OK(link.submit());
    for (int i = 0; i < round; ++i) link.drive();
    const Deadline deadline = Deadline::after(kPatience);
    while (!link.transfer->cancel()) {
      CHECK(!deadline.passed());
      link.drive();
    }
    std::memset(link.local_bytes.data(), 'k', size);
    const auto state = link.transfer->poll();
    CHECK(state ? *state == TransferState::kDone : state.error().code == Code::kCancelled);
    const Deadline soon = Deadline::after(2'000'000);
    while (!soon.passed()) link.drive();
    check_same(link.local_bytes, std::string(size, 'k'));
    link.transfer.reset();
  }
}

void messages_arrive_in_order_once(const BackendCase& which) {
  Link link(which, 4096);
  Notifier& out = *link.here->backend->notifier();
  Notifier& in = *link.there->backend->notifier();
  std::vector<std::string> sent;
  for (int i = 0; i < 1000; ++i) sent.push_back(std::string("m\0", 2) + std::to_string(i));
  sent.push_back(pattern(1 << 20, 8));
  sent.push_back("");
  std::vector<Notification> seen;
  for (const std::string& message : sent) {
    CHECK_OK(out.send(*link.line, message));
    link.drive();
    in.drain(seen);
  }
  const Deadline deadline = Deadline::after(kPatience);
  while (seen.size() < sent.size() && !deadline.passed()) {
    link.drive();
    in.drain(seen);
  }
  for (const Deadline soon = Deadline::after(20'000'000); !soon.passed(); in.drain(seen)) link.drive();
  CHECK_EQ(seen.size(), sent.size());
  for (std::size_t i = 0; i < sent.size(); ++i) {
    CHECK_EQ(seen[i].sender, "here");
    CHECK(seen[i].message == sent[i]);
  }
}

void attached_message_follows_data(const BackendCase& which) {
  const std::size_t size = 1 << 20;
  Link link(which, size);
  Plan plan = link.plan(Op::kWrite);
  for (std::size_t at = 0; at < size; at += 1 << 14) link.add(plan, at, at, 1 << 14);
  link.prepare(std::move(plan));
  std::vector<Notification> seen;
  for (int round = 0; round < 100; ++round) {
    std::memset(link.local_bytes.data(), 'a' + round % 26, size);
    const std::string message = "round " + std::to_string(round);
    CHECK_OK(link.submit(message));
    const Deadline deadline = Deadline::after(kPatience);
    while (seen.empty() && !deadline.passed()) {  // nobody polls the transfer
      link.drive();
      link.there->backend->notifier()->drain(seen);
    }
    CHECK_EQ(seen.size(), 1u);
    CHECK_EQ(seen[0].message, message);
    check_same(link.remote_bytes, std::string(size, static_cast<char>('a' + round % 26)));
    seen.clear();
    CHECK_OK(link.finish());
  }
  for (const Deadline soon = Deadline::after(20'000'000); !soon.passed(); link.drive())
    link.there->backend->notifier()->drain(seen);
  CHECK(seen.empty());
}

void sleeper_wakes(const BackendCase& which) {
  Link link(which, 4096);
  Backend& sleeper = *link.there->backend;
  if (sleeper.event_fd() < 0) return;
  std::vector<Notification> seen;
  CHECK_OK(link.here->backend->notifier()->send(*link.line, "wire up"));
  const Deadline deadline = Deadline::after(kPatience);
  while (seen.empty() && !deadline.passed()) {
    link.drive();
    sleeper.notifier()->drain(seen);
  }
  for (int round = 0; round < 20; ++round) {
    seen.clear();
    while (!sleeper.arm()) sleeper.progress();
    CHECK_OK(link.here->backend->notifier()->send(*link.line, "wake"));
    while (seen.empty()) {
      CHECK(!deadline.passed());
      pollfd waiting{sleeper.event_fd(), POLLIN, 0};
      while (poll(&waiting, 1, 1) == 0) {
        link.here->backend->progress();
        CHECK(!deadline.passed());
      }
      do {
        sleeper.progress();
        sleeper.notifier()->drain(seen);
      } while (seen.empty() && !sleeper.arm());
    }
  }
}

void lost_peer_is_told(const BackendCase& which) {
  Link link(which, 4096);
  Plan plan = link.plan(Op::kWrite);
  link.add(plan, 0, 0, 4096);
  link.prepare(std::move(plan));
  link.run();
  link.remote_owner.reset();
  link.there.reset();
  const Deadline deadline = Deadline::after(kPatience);
  for (;;) {
    auto state = link.submit();
    if (state) state = link.finish();
    if (!state) {
      const Code code = state.error().code;
      if (code == Code::kPeerLost) break;
      // Memory goes before its agent: until that is noticed, the peer is a living one that has deregistered it.
      const bool expected = code == Code::kIo || code == Code::kNotFound;
      if (!expected) std::fprintf(stderr, "%s: %s\n", std::string(name(code)).c_str(), state.error().reason.c_str());
      CHECK(expected);
    }
    CHECK(!deadline.passed());
  }
  while (link.here->lost.count == 0 && !deadline.passed()) link.drive();
  CHECK_EQ(link.here->lost.count.load(), 1);
  auto again = link.submit();
  if (again) again = link.finish();
  CHECK(!again && again.error().code == Code::kPeerLost);  // and nothing else from then on
}

void foreign_bytes_are_refused(const BackendCase& which) {
  Link link(which, 4096);
  Backend& backend = *link.here->backend;
  const std::string good = *CHECK_OK(link.there->backend->export_connection());
  const std::string key = *CHECK_OK(link.there->backend->export_region(*link.remote_owner));
  std::mt19937 random(9);
  for (int round = 0; round < 200; ++round) {
    std::string bytes = good;
    if (round < static_cast<int>(good.size()))
      bytes.resize(round);
    else
      for (int i = 0; i < 3; ++i) bytes[random() % bytes.size()] = static_cast<char>(random());
    auto line = backend.connect({"stranger", 99u + round}, bytes);  // refused, or harmless
    if (round < static_cast<int>(good.size())) CHECK(!line);
  }
  for (std::size_t size = 0; size < key.size(); ++size)
    CHECK(!backend.import_region(*link.line, link.there_region, key.substr(0, size)));
}

void bad_parameters_are_refused(const BackendCase& which) {
  for (const Params& bad : which.bad_params) {
    BackendConfig config;
    config.self = {"agent", 1};
    config.params = which.entry->params;
    for (const auto& [key, value] : bad) config.params[key] = value;
    const auto opened = which.entry->open(std::move(config));
    CHECK(!opened);
    CHECK(opened.error().reason.find(bad.begin()->first) != std::string::npos);
  }
}

struct Item {
  const char* name;
  void (*body)(const BackendCase&);
  bool needs_peer;
};
constexpr Item kItems[] = {
    {"abilities_are_true", abilities_are_true, false},
    {"regions_come_and_go", regions_come_and_go, false},
    {"sizes_and_odd_offsets", sizes_and_odd_offsets, false},
    {"lists", lists, false},
    {"strided_runs", strided_runs, false},
    {"reposts", reposts, false},
    {"cancel_leaves_memory_alone", cancel_leaves_memory_alone, false},
    {"messages_arrive_in_order_once", messages_arrive_in_order_once, true},
    {"attached_message_follows_data", attached_message_follows_data, true},
    {"sleeper_wakes", sleeper_wakes, true},
    {"lost_peer_is_told", lost_peer_is_told, true},
    {"foreign_bytes_are_refused", foreign_bytes_are_refused, true},
    {"bad_parameters_are_refused", bad_parameters_are_refused, false},
};

}  // namespace

int run_backend_suite(const BackendCase& which, int argc, char** argv) {
  const Probe probe = which.entry->probe();
  if (!probe.viable) {
    std::fprintf(stderr, "SKIP: %s: %s\n", which.entry->name.c_str(), probe.reason.c_str());
    return 77;
  }
  for (const Item& item : kItems) {
    if (argc > 1 && !std::strstr(item.name, argv[1])) continue;
    if (item.needs_peer && which.make_target) {
      std::fprintf(stderr, "[ n/a ] %s: %s has no peers\n", item.name, which.entry->name.c_str());
      continue;
    }
    if (item.body == strided_runs && which.whole_targets) {
      std::fprintf(stderr, "[ n/a ] %s: %s writes whole objects only\n", item.name, which.entry->name.c_str());
      continue;
    }
    std::fprintf(stderr, "[ run ] %s %s\n", which.entry->name.c_str(), item.name);
    item.body(which);
  }
  return 0;
}

}  // namespace nixl::core::conformance
