// Parameters, the choice of the provider, missing libraries, messages, and links that break; no second process needed.
#include <arpa/inet.h>
#include <dlfcn.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <thread>
#include <vector>

#include "backends/libfabric/entry.h"
#include "backends/libfabric/messages.h"
#include "backends/libfabric/options.h"
#include "backends/libfabric/provider.h"
#include "fuzz.h"
#include "peer_process.h"

using namespace nixl::core;
using namespace nixl::core::libfabric;
using namespace nixl::core::test;

namespace {

TEST(parameters_beat_the_environment_beats_defaults) {
  unsetenv("NIXL_LIBFABRIC_POST_QUEUE_SIZE");
  CHECK_EQ(CHECK_OK(parse_options(default_params()))->post_queue_size, 32768u);
  setenv("NIXL_LIBFABRIC_POST_QUEUE_SIZE", "77", 1);
  CHECK_EQ(CHECK_OK(parse_options(default_params()))->post_queue_size, 77u);
  CHECK_EQ(CHECK_OK(parse_options({{"post_queue_size", "5"}}))->post_queue_size, 5u);
  CHECK_EQ(CHECK_OK(parse_options({{"post_queue_size", ""}}))->post_queue_size, 77u);
  setenv("NIXL_LIBFABRIC_POST_QUEUE_SIZE", "lots", 1);
  const auto refused = parse_options({});
  CHECK(!refused && refused.error().code == Code::kInvalidArgument);
  CHECK(check::has(refused.error().reason, "NIXL_LIBFABRIC_POST_QUEUE_SIZE") &&
        check::has(refused.error().reason, "lots"));
  unsetenv("NIXL_LIBFABRIC_POST_QUEUE_SIZE");
}

TEST(every_parameter_is_read_from_both_places) {
  for (const auto& [key, value] : Params{{"num_threads", "1"},
                                         {"split_batch_size", "2"},
                                         {"striping_threshold", "3"},
                                         {"max_bw_per_dram_seg", "4"},
                                         {"post_queue_size", "5"},
                                         {"provider", "efa"}}) {
    std::string variable = "NIXL_LIBFABRIC_" + key;
    for (char& letter : variable) letter = static_cast<char>(std::toupper(letter));
    setenv(variable.c_str(), value.c_str(), 1);
    const Options by_variable = *CHECK_OK(parse_options(default_params()));
    unsetenv(variable.c_str());
    const Options by_parameter = *CHECK_OK(parse_options({{key, value}}));
    const auto same = [](const Options& a, const Options& b) {
      return a.own_thread == b.own_thread && a.split_batch_size == b.split_batch_size &&
             a.striping_threshold == b.striping_threshold && a.max_gbits_per_segment == b.max_gbits_per_segment &&
             a.post_queue_size == b.post_queue_size && a.provider == b.provider;
    };
    CHECK(same(by_variable, by_parameter));
    CHECK(!same(by_variable, Options{}));
  }
}

Probe probe_with(const char* variable, const char* value) {
  setenv(variable, value, 1);
  return backends_of_libfabric()[0].probe();
}

TEST(what_is_missing_is_said) {
  check::in_child([] {
    const Probe probe = probe_with("NIXL_LIBFABRIC_LIBRARY", "/nowhere/libfabric.so.1");
    CHECK(!probe.viable && check::has(probe.reason, "libfabric.so.1") && check::has(probe.reason, "/nowhere"));
    BackendConfig config;
    const auto opened = backends_of_libfabric()[0].open(std::move(config));
    CHECK(!opened && opened.error().code == Code::kUnsupported && opened.error().reason == probe.reason);
  });
  check::in_child([] {
    const Probe probe = probe_with("NIXL_LIBFABRIC_LIBRARY", "libc.so.6");
    CHECK(!probe.viable && check::has(probe.reason, "fi_getinfo"));
  });
  check::in_child([] {
    const Probe probe = probe_with("NIXL_LIBFABRIC_PROVIDER", "pigeons");
    CHECK(!probe.viable && check::has(probe.reason, "no RMA-capable provider named pigeons"));
    CHECK(check::has(probe.reason, "its providers: ") && check::has(probe.reason, "tcp"));
  });
  check::in_child([] {  // ends at this host
    CHECK(!probe_with("NIXL_LIBFABRIC_PROVIDER", "shm").viable);
  });
}

int num_threads() {
  int count = 0;
  for ([[maybe_unused]] const auto& thread : std::filesystem::directory_iterator("/proc/self/task")) ++count;
  return count;
}

TEST(probing_leaves_signals_alone_and_starts_no_thread) {
  check::in_child([] {
    for (const int number : {SIGINT, SIGTERM, SIGSEGV, SIGABRT}) signal(number, SIG_IGN);
    const int before = num_threads();
    (void)backends_of_libfabric()[0].probe();
    for (const int number : {SIGINT, SIGTERM, SIGSEGV, SIGABRT}) CHECK(signal(number, SIG_DFL) == SIG_IGN);
    CHECK_EQ(num_threads(), before);
  });
}

// ---- the choice, among what a made-up machine offers ----

struct Offer {
  const char *provider, *device;
  bool delivery_complete = true, device_memory = false;
  const char* address = nullptr;  // IPv4
};
std::vector<Offer> offers;

int offered(std::uint32_t, const char*, const char*, std::uint64_t flags, const fi_info* hints, fi_info** out) {
  const Api& real = **open_api();
  *out = nullptr;
  fi_info** end = out;
  for (const Offer& offer : offers) {
    if (flags == 0) {
      if (hints->tx_attr->op_flags == FI_DELIVERY_COMPLETE && !offer.delivery_complete) continue;
      if ((hints->caps & FI_HMEM) != 0 && !offer.device_memory) continue;
    }
    fi_info* const info = real.dupinfo(nullptr);
    info->fabric_attr->prov_name = strdup(offer.provider);
    info->domain_attr->name = strdup(offer.device);
    if (offer.address) {
      auto* const address = static_cast<sockaddr_in*>(std::calloc(1, sizeof(sockaddr_in)));
      address->sin_family = AF_INET;
      inet_pton(AF_INET, offer.address, &address->sin_addr);
      info->addr_format = FI_SOCKADDR_IN;
      info->src_addr = address;
      info->src_addrlen = sizeof(sockaddr_in);
    }
    *end = info;
    end = &info->next;
  }
  return *out ? 0 : -FI_ENODATA;
}

bool built_with_cuda = true;

int settings_shown(fi_param** settings, int* count) {
  static fi_param shown[2];
  shown[0].name = "FI_PROVIDER";
  shown[1].name = "FI_HMEM_CUDA_USE_GDRCOPY";
  *settings = shown;
  *count = built_with_cuda ? 2 : 1;
  return 0;
}

Result<Provider> choose(std::vector<Offer> list, const std::string& asked = "auto", bool device_memory = false) {
  static Api api = [] {
    Api made_up = **open_api();
    made_up.getinfo = &offered;
    made_up.getparams = &settings_shown;
    made_up.freeparams = [](fi_param*) {};
    return made_up;
  }();
  offers = std::move(list);
  return choose_provider(api, asked, device_memory);
}

TEST(hardware_comes_first_and_efa_before_all) {
  CHECK_EQ(CHECK_OK(choose({{"tcp;ofi_rxm", "eth0"}, {"verbs;ofi_rxm", "mlx5_0"}, {"efa", "rdmap0"}}))->name, "efa");
  CHECK_EQ(CHECK_OK(choose({{"tcp;ofi_rxm", "eth0"}, {"shm", "shm"}, {"verbs;ofi_rxm", "mlx5_0"}}))->name,
           "verbs;ofi_rxm");
  CHECK_EQ(CHECK_OK(choose({{"sockets", "eth0"}, {"tcp;ofi_rxm", "eth0"}, {"brand-new", "x"}}))->name, "brand-new");
  CHECK_EQ(CHECK_OK(choose({{"udp;ofi_rxd", "eth0"}, {"sockets", "eth0"}, {"tcp;ofi_rxm", "eth0"}}))->name,
           "tcp;ofi_rxm");
  CHECK_EQ(CHECK_OK(choose({{"efa", "a"}, {"tcp;ofi_rxm", "eth0"}}, "tcp"))->name, "tcp;ofi_rxm");
  CHECK_EQ(CHECK_OK(choose({{"tcp;ofi_rxm", "eth0"}, {"tcp", "eth0"}}, "tcp"))->name, "tcp");
  const auto none = choose({{"shm", "shm"}});
  CHECK(!none && none.error().code == Code::kUnsupported);
  CHECK(check::has(none.error().reason, "no RMA-capable provider") &&
        check::has(none.error().reason, "its providers: shm"));
  CHECK(!choose({}));
}

TEST(every_device_is_one_rail_with_its_best_address) {
  const Provider tcp = *CHECK_OK(choose({{"tcp", "eth0", true, false, "10.0.0.1"},
                                         {"tcp", "eth0", true, false, "10.0.0.2"},
                                         {"tcp", "lo", true, false, "127.0.0.1"},
                                         {"tcp", "eth1", true, false, "10.1.0.1"}}));
  CHECK_EQ(tcp.rails.size(), 2u);
  CHECK_EQ(std::string(tcp.rails[0]->domain_attr->name) + tcp.rails[1]->domain_attr->name, "eth0eth1");
  CHECK_EQ(CHECK_OK(choose({{"tcp", "lo", true, false, "127.0.0.1"}}))->rails.size(), 1u);
}

TEST(without_delivery_completion_there_is_one_rail) {
  const Provider weak = *CHECK_OK(choose({{"verbs", "a", false}, {"verbs", "b", false}}));
  CHECK(!weak.delivery_complete);
  CHECK_EQ(weak.rails.size(), 1u);
  CHECK(CHECK_OK(choose({{"verbs", "a", false}, {"tcp", "eth0", true}}))->delivery_complete);
}

TEST(device_memory_is_served_where_the_provider_can) {
  CHECK(CHECK_OK(choose({{"efa", "a", true, true}}, "auto", true))->device_memory);
  CHECK(!CHECK_OK(choose({{"efa", "a", true, true}}, "auto", false))->device_memory);
  CHECK(!CHECK_OK(choose({{"tcp", "eth0"}}, "auto", true))->device_memory);
  built_with_cuda = false;
  CHECK(!CHECK_OK(choose({{"efa", "a", true, true}}, "auto", true))->device_memory);
  built_with_cuda = true;
}

// ---- messages ----

TEST(messages_survive_and_damage_is_refused_or_read) {
  const ConnectionBytes connection{"tcp", 3, true, {{"net", "address one"}, {"net2", "address two"}}};
  const ConnectionBytes back = *CHECK_OK(decode_connection(encode(connection)));
  CHECK(back.provider == "tcp" && back.driven && back.rails[1].address == "address two" && back.address_format == 3);
  const RegionKey key{7, {{1, 2}, {3, 4}}};
  CHECK_EQ(CHECK_OK(decode_key(encode(key)))->rails[1].base, 4u);
  const std::string hello = encode(Hello{1, 2, 3, 4, 5, "name", "address"});
  CHECK_EQ(CHECK_OK(decode_hello(hello))->attempt, 5u);
  const std::string notify = encode(Notify{1, 2, 3, 10, 6, "part"});
  CHECK_EQ(std::string(CHECK_OK(decode_notify(notify))->part), "part");
  CHECK_EQ(notify.size(), kNotifyHeaderBytes + 4);
  CHECK(!decode_notify(encode(Notify{1, 2, 3, 9, 6, "part"})));

  for (const std::string& sealed : {encode(connection), encode(key)})
    for (std::size_t size = 0; size < sealed.size(); ++size)
      CHECK(!decode_connection(sealed.substr(0, size)) && !decode_key(sealed.substr(0, size)));
  for (const std::string& good : {encode(connection), encode(key), hello, notify, encode(HelloAck{1, 2, 3, 4, 5}),
                                  encode(Revoke{1, 2}), encode(MessageKind::kPing, LinkWord{1, 2, 3})})
    check::fuzz(good, [](const std::string& bytes) {
      (void)decode_connection(bytes), (void)decode_key(bytes);
      if (bytes.empty()) return;
      (void)decode_hello(bytes), (void)decode_ack(bytes), (void)decode_revoke(bytes), (void)decode_word(bytes);
      if (const auto part = decode_notify(bytes)) CHECK(part->offset + part->part.size() <= part->total);
    });
}

// ---- links ----

const Params kTcp = {{"provider", "tcp"}};

TEST(notifications_survive_broken_connections) {
  Node here("here", 1, kTcp), there("there", 2, kTcp);
  auto line = here.connect(there);
  CHECK_OK(line->wait_ready(Deadline::after(kPatience)));
  std::vector<Notification> seen;
  constexpr int kMessages = 60;
  int num_cut = 0;
  for (int i = 0; i < kMessages; ++i) {
    CHECK_OK(here.backend->notifier()->send(*line, std::to_string(i)));
    if (i % 20 == 10) num_cut += cut_connections();
    there.backend->notifier()->drain(seen);
    usleep(500);
  }
  CHECK(num_cut > 0);
  for (const Deadline deadline = Deadline::after(kPatience); seen.size() < kMessages; usleep(1000)) {
    CHECK(!deadline.passed());
    there.backend->notifier()->drain(seen);
  }
  for (int i = 0; i < kMessages; ++i) CHECK_EQ(seen[static_cast<std::size_t>(i)].message, std::to_string(i));
  CHECK_EQ(here.lost.count.load(), 0);
}

struct Buffers {
  Buffers(Node& a, Node& b, Connection& to_b, std::size_t size) : line(to_b), local(size, 'l'), remote(size, 'r') {
    ours = std::move(*CHECK_OK(a.backend->add_region(region(local))));
    theirs = std::move(*CHECK_OK(b.backend->add_region(region(remote))));
    imported = std::move(
        *CHECK_OK(a.backend->import_region(line, region(remote), *CHECK_OK(b.backend->export_region(*theirs)))));
  }
  static Region region(std::vector<char>& bytes) {
    return {MemKind::kDram, reinterpret_cast<std::uint64_t>(bytes.data()), bytes.size(), 0, ""};
  }
  Plan plan(Op op, std::size_t at, std::size_t size, std::size_t pieces) {
    Plan plan = plan_between(op, line, *ours, *imported);
    for (std::size_t i = 0; i < pieces; ++i) {  // from the last to the first: nothing to merge
      const std::size_t piece = at + (pieces - 1 - i) * (size / pieces);
      add_block(plan, region(local).address + piece, region(remote).address + piece, size / pieces);
    }
    return plan;
  }
  Connection& line;
  std::vector<char> local, remote;
  std::unique_ptr<LocalRegion> ours, theirs;
  std::unique_ptr<RemoteRegion> imported;
};

void run(Transfer& transfer) {
  auto state = transfer.submit({});
  for (const Deadline deadline = Deadline::after(kPatience); state && *state == TransferState::kRunning;) {
    CHECK(!deadline.passed());
    state = transfer.poll();
  }
  CHECK_OK(state);
}

TEST(a_transfer_starts_over_when_its_connection_breaks) {
  Node here("here", 1, kTcp), there("there", 2, kTcp);
  auto line = here.connect(there);
  Buffers buffers(here, there, *line, 32 << 20);
  for (const Op op : {Op::kWrite, Op::kRead}) {
    std::fill(buffers.local.begin(), buffers.local.end(), 'w');
    if (op == Op::kRead) std::fill(buffers.remote.begin(), buffers.remote.end(), 'q');
    auto transfer = std::move(*CHECK_OK(here.backend->prepare(buffers.plan(op, 0, 32 << 20, 512))));
    CHECK_OK(transfer->submit("done"));
    usleep(1000);
    (void)cut_connections();
    Result<TransferState> state = TransferState::kRunning;
    for (const Deadline deadline = Deadline::after(kPatience); state && *state == TransferState::kRunning;) {
      CHECK(!deadline.passed());
      state = transfer->poll();
    }
    CHECK_OK(state);
    std::vector<Notification> seen;
    for (const Deadline deadline = Deadline::after(kPatience); seen.empty(); usleep(100)) {
      CHECK(!deadline.passed());
      there.backend->notifier()->drain(seen);
    }
    CHECK(buffers.local == buffers.remote);
  }
  CHECK_EQ(here.lost.count.load(), 0);
  buffers.imported.reset();
}

TEST(many_threads_share_one_backend) {
  constexpr int kThreads = 4, kRounds = 40;
  constexpr std::size_t kShare = 64 << 10;
  Node here("here", 1, {{"provider", "tcp"}, {"post_queue_size", "8"}}), there("there", 2, kTcp);
  auto line = here.connect(there);
  Buffers buffers(here, there, *line, kThreads * kShare);
  std::vector<std::thread> threads;
  for (std::size_t t = 0; t < kThreads; ++t)
    threads.emplace_back([&, t] {
      auto write = std::move(*CHECK_OK(here.backend->prepare(buffers.plan(Op::kWrite, t * kShare, kShare, 16))));
      auto read = std::move(*CHECK_OK(here.backend->prepare(buffers.plan(Op::kRead, t * kShare, kShare, 4))));
      char* const mine = buffers.local.data() + t * kShare;
      for (int round = 0; round < kRounds; ++round) {
        const char letter = static_cast<char>('a' + (static_cast<int>(t) + round) % 26);
        std::memset(mine, letter, kShare);
        run(*write);
        std::memset(mine, 0, kShare);
        run(*read);
        CHECK(mine[0] == letter && mine[kShare - 1] == letter);
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(buffers.local == buffers.remote);
}

TEST(an_agent_reaches_itself) {
  Node here("here", 1, kTcp);
  auto line = here.connect(here);
  Buffers buffers(here, here, *line, 4 << 20);
  auto write = std::move(*CHECK_OK(here.backend->prepare(buffers.plan(Op::kWrite, 0, 4 << 20, 64))));
  run(*write);
  CHECK(buffers.local == buffers.remote);
  CHECK_EQ(write->path(), "memcpy");
}

}  // namespace

int main(int argc, char** argv) {
  // In a child, because the library is looked for but once, and other tests, in children too, come to it first.
  int status = 0;
  if (const pid_t child = fork(); child == 0)
    _exit(dlopen("libfabric.so.1", RTLD_NOW) ? 0 : 1);
  else if (waitpid(child, &status, 0) != child || status != 0)
    SKIP("no libfabric.so.1 can be loaded (Debian: libfabric1)");
  tested = &backends_of_libfabric()[0];
  return check::run_tests(argc, argv);
}
