// Parameters, precedence of UCX's configuration, message layout and the order of notifications; no second process
// needed.
#include <dlfcn.h>
#include <poll.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "backends/ucx/entry.h"
#include "backends/ucx/inbox.h"
#include "backends/ucx/messages.h"
#include "backends/ucx/options.h"
#include "backends/ucx/shares.h"
#include "contract/plan_cursor.h"
#include "fuzz.h"
#include "peer_process.h"

using namespace nixl::core;
using namespace nixl::core::ucx;
using namespace nixl::core::test;

namespace {

const Params kTcp = {{"UCX_TLS", "tcp"}};

// The value that UCX itself shows for a key of the configuration made from `params`.
std::string value_in_ucx(const Params& params, const std::string& key) {
  const Api& api = **CHECK_OK(open_api());
  ucp_config_t* const config = *CHECK_OK(make_config(api, *CHECK_OK(parse_options(params))));
  void* const library = dlopen(api.path.c_str(), RTLD_NOW | RTLD_NOLOAD);
  const auto print = reinterpret_cast<decltype(&ucp_config_print)>(dlsym(library, "ucp_config_print"));
  char* text = nullptr;
  std::size_t size = 0;
  FILE* const file = open_memstream(&text, &size);
  print(config, file, nullptr, UCS_CONFIG_PRINT_CONFIG);
  std::fclose(file);
  api.config_release(config);
  const std::string shown(text, size);
  std::free(text);
  const std::string start = "UCX_" + key + "=";
  const std::size_t at = shown.find(start);
  CHECK(at != std::string::npos);
  return shown.substr(at + start.size(), shown.find('\n', at) - at - start.size());
}

// What the very first opening of the library in this process did.
struct Opening {
  bool environment_kept = false;
  Nanoseconds took = 0;
} first_opening;

void open_first() {
  const auto variables = [] {
    std::vector<std::string> list;
    for (char** entry = environ; *entry; ++entry) list.emplace_back(*entry);
    return list;
  };
  const auto before = variables();
  char** const place = environ;
  const Nanoseconds start = now_ns();
  (void)open_api();
  first_opening.took = now_ns() - start;
  first_opening.environment_kept = environ == place && variables() == before;
}

TEST(opening_is_quick_and_leaves_the_environment_as_it_was) {
  CHECK(first_opening.environment_kept);
  if (!std::getenv("UCX_MEM_EVENTS") && !std::getenv("UCX_MEM_BISTRO_GRACE_DURATION"))
    CHECK(first_opening.took < 390'000'000);  // eight patches of 50 ms take 400 at least
}

TEST(device_names_get_ports) {
  CHECK_EQ(device_names("mlx5_0"), "mlx5_0:1");
  CHECK_EQ(device_names("mlx5_0, mlx5_1:2  mlx5_2"), "mlx5_0:1,mlx5_1:2,mlx5_2:1");
  CHECK_EQ(device_names("lo"), "lo");
  CHECK_EQ(device_names("all"), "all");
  CHECK_EQ(device_names(""), "");
}

TEST(parameters_become_options) {
  const Options options = *CHECK_OK(parse_options({{"num_workers", "3"},
                                                   {"num_threads", "2"},
                                                   {"ucx_error_handling_mode", "none"},
                                                   {"engine_config", "TLS=tcp,self, UCX_MAX_RMA_RAILS=1"},
                                                   {"UCX_BCOPY_THRESH", "1k"},
                                                   {"device_list", ""}}));
  CHECK_EQ(options.num_workers, 3);
  CHECK_EQ(options.num_threads, 2);
  CHECK(!options.peer_errors);
  CHECK_EQ(options.entries.size(), 3u);
  CHECK_EQ(options.entries[0].first + "=" + options.entries[0].second, "TLS=tcp,self");
  CHECK_EQ(options.entries[1].first + "=" + options.entries[1].second, "MAX_RMA_RAILS=1");
  CHECK_EQ(options.entries[2].first, "BCOPY_THRESH");
  const auto defaults = parse_options(default_params(true));  // an unedited dict may be passed back
  CHECK(defaults && defaults->num_workers == 1);
  for (const auto& [key, value] :
       Params{{"num_workers", "0"}, {"num_threads", "many"}, {"engine_config", "nonsense"}}) {
    const auto refused = parse_options({{key, value}});
    CHECK(!refused && refused.error().code == Code::kInvalidArgument);
    CHECK(refused.error().reason.find(key) != std::string::npos &&
          refused.error().reason.find(value) != std::string::npos);
  }
}

TEST(environment_beats_parameters_beats_our_defaults) {
  unsetenv("UCX_MAX_RMA_RAILS");
  CHECK_EQ(value_in_ucx({}, "MAX_RMA_RAILS"), "2");
  CHECK_EQ(value_in_ucx({{"UCX_MAX_RMA_RAILS", "3"}}, "MAX_RMA_RAILS"), "3");
  setenv("UCX_MAX_RMA_RAILS", "1", 1);
  CHECK_EQ(value_in_ucx({}, "MAX_RMA_RAILS"), "1");
  CHECK_EQ(value_in_ucx({{"engine_config", "MAX_RMA_RAILS=3"}}, "MAX_RMA_RAILS"), "1");
  CHECK_EQ(std::string(std::getenv("UCX_MAX_RMA_RAILS")), "1");
  unsetenv("UCX_MAX_RMA_RAILS");
}

TEST(devices_of_the_caller_beat_the_environment) {
  setenv("UCX_NET_DEVICES", "eth0", 1);
  CHECK_EQ(value_in_ucx({}, "NET_DEVICES"), "eth0");
  CHECK_EQ(value_in_ucx({{"UCX_NET_DEVICES", "lo"}}, "NET_DEVICES"), "lo");
  CHECK_EQ(value_in_ucx({{"device_list", "mlx5_3"}}, "NET_DEVICES"), "mlx5_3:1");
  unsetenv("UCX_NET_DEVICES");
}

TEST(transports_that_do_not_exist_leave_an_agent_alone_but_alive) {
  BackendConfig config;
  config.self = {"lonely", 1};
  config.params = backends_of_ucx()[0].params;
  config.params["UCX_TLS"] = "rc,gdr_copy";
  auto backend = CHECK_OK(backends_of_ucx()[0].open(std::move(config)));
  BackendConfig reachable;
  reachable.self = {"other", 2};
  reachable.params = backends_of_ucx()[0].params;
  reachable.params["UCX_TLS"] = "tcp";
  auto other = CHECK_OK(backends_of_ucx()[0].open(std::move(reachable)));
  const auto line = (*backend)->connect({"other", 2}, *CHECK_OK((*other)->export_connection()));
  CHECK(!line && line.error().code == Code::kIo);
  CHECK(line.error().reason.find("UCX_TLS=rc,gdr_copy") != std::string::npos);
  CHECK(line.error().reason.find("'other'") != std::string::npos);
}

TEST(messages_survive_and_truncation_is_refused) {
  Hello hello{1, 2, 3, "name", std::string("address\0x", 9)};
  Hello hello_back;
  CHECK_OK(decode(encode(hello), hello_back));
  CHECK(hello_back.name == hello.name && hello_back.address == hello.address && hello_back.link == 3);

  ReadRequest request{7, 8, 9, {"key one", "key two"}, {{1, 2, 3, 4, 1}, {5, 6, 7, 8, 0}}};
  const std::string bytes = encode(request);
  ReadRequest request_back;
  CHECK_OK(decode(bytes, request_back));
  CHECK(request_back.keys[1] == "key two" && request_back.pieces[1].length == 8 && request_back.pieces[0].key == 1);
  for (std::size_t size = 0; size < bytes.size(); ++size) {
    ReadRequest cut;
    CHECK(!decode(bytes.substr(0, size), cut));
  }
  request.pieces[0].key = 2;
  CHECK(!decode(encode(request), request_back));
}

TEST(damaged_messages_are_refused_or_read_and_no_more) {
  Notify notify;
  notify.name = "name";
  notify.text = "text";
  ReadRequest read;
  read.keys = {"key one", "key two"};
  read.pieces.resize(3);
  read.pieces[2].key = 1;
  for (const std::string& good : {encode(Hello{1, 2, 3, "name", "address"}), encode(HelloAck{1, 2, 3}), encode(notify),
                                  encode(read), encode(ReadDone{1, 2, "reason"}), encode(Revoke{1, 2}), encode(Bye{1})})
    check::fuzz(good, [](const std::string& bytes) {
      Hello hello;
      HelloAck ack;
      Notify note;
      ReadRequest request;
      ReadDone done;
      Revoke revoke;
      Bye bye;
      (void)decode(bytes, hello), (void)decode(bytes, ack), (void)decode(bytes, note);
      (void)decode(bytes, done), (void)decode(bytes, revoke), (void)decode(bytes, bye);
      if (decode(bytes, request))
        for (const ReadPiece& piece : request.pieces) CHECK(piece.key < request.keys.size());
    });
}

TEST(notifications_keep_the_order_of_their_stream) {
  Inbox inbox;
  std::vector<Notification> seen;
  inbox.add(1, 1, 1, {"a", "second"});
  inbox.add(1, 1, 2, {"a", "third"});
  inbox.add(2, 1, 0, {"b", "other stream"});
  inbox.drain(seen);
  CHECK_EQ(seen.size(), 1u);
  inbox.add(1, 1, 0, {"a", "first"});
  inbox.add(1, 1, 0, {"a", "first again"});
  inbox.drain(seen);
  CHECK_EQ(seen.size(), 4u);
  CHECK_EQ(seen[1].message + seen[2].message + seen[3].message, "firstsecondthird");
  CHECK_EQ(inbox.next_sequence(1, 1), 3u);
  CHECK_EQ(inbox.next_sequence(9, 9), 0u);
}

// Every byte of a plan is in exactly one share, and the shares are about equal.
TEST(shares_cover_a_plan_once) {
  std::mt19937 random(11);
  for (int round = 0; round < 300; ++round) {
    Plan plan;
    const bool runs = round % 2;
    const std::uint64_t longest = round % 3 == 0 ? 6 << 20 : 300;
    plan.local_regions = {nullptr};
    std::uint64_t at = 1 << 20;
    for (std::size_t row = 0; row < 1 + random() % 40; ++row) {
      const std::uint64_t length = random() % longest, count = runs ? 1 + random() % 50 : 1,
                          stride = length + random() % 9;
      plan.local_address.push_back(at);
      plan.remote_address.push_back(at + 5);
      plan.length.push_back(length);
      plan.local_region.push_back(0);
      plan.remote_region.push_back(0);
      if (runs) {
        plan.count.push_back(count);
        plan.local_stride.push_back(stride);
        plan.remote_stride.push_back(stride);
      }
      at += count * stride + 1000;
      plan.num_blocks += count;
      plan.total_bytes += count * length;
    }
    const auto pieces_of = [](const Plan& part) {
      std::vector<std::pair<std::uint64_t, std::uint64_t>> all;
      for (PlanCursor cursor(part); !cursor.at_end();) {
        const Piece piece = cursor.next(UINT64_MAX);
        CHECK_EQ(piece.remote, piece.local + 5);
        if (!all.empty() && all.back().first + all.back().second == piece.local)
          all.back().second += piece.length;
        else
          all.emplace_back(piece.local, piece.length);
      }
      return all;
    };
    auto whole = pieces_of(plan);
    const std::uint64_t total = plan.total_bytes;
    const std::size_t parts = 1 + random() % 5;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> together;
    const std::vector<Plan> shares = share_out(std::move(plan), parts);
    CHECK(!shares.empty() && shares.size() <= parts);
    for (const Plan& share : shares) {
      CHECK(share.total_bytes <= total / parts + parts + 2 * longest);
      for (const auto& [from, length] : pieces_of(share))
        if (!together.empty() && together.back().first + together.back().second == from)
          together.back().second += length;
        else
          together.emplace_back(from, length);
    }
    CHECK(together == whole);
  }
}

// UCX tells some news once, to whoever arms next: after that answer a look must not be left out.
TEST(news_that_only_arming_tells_is_looked_at) {
  for (std::uint64_t round = 0; round < 4; ++round) {
    BackendConfig config;
    config.params = backends_of_ucx()[0].params;
    config.params["UCX_TLS"] = "tcp";
    config.self = {"asked", 2};
    auto asked = std::move(*CHECK_OK(backends_of_ucx()[0].open(BackendConfig(config))));
    for (int i = 0; i < 1000; ++i) asked->progress();  // until looks are left out
    while (!asked->arm()) asked->progress();
    config.self = {"asker", 1};
    auto asker = std::move(*CHECK_OK(backends_of_ucx()[0].open(BackendConfig(config))));
    auto line = std::move(*CHECK_OK(asker->connect({"asked", 2}, *CHECK_OK(asked->export_connection()))));
    std::atomic<bool> connected{false};
    std::thread waiter([&] {
      CHECK_OK(line->wait_ready(Deadline::after(5'000'000'000)));
      connected = true;
    });
    while (!connected) {
      asker->progress();
      if (!asked->arm()) {
        asked->progress();
        continue;
      }
      pollfd wait{asked->event_fd(), POLLIN, 0};
      if (poll(&wait, 1, 0) > 0) asked->progress();
    }
    waiter.join();
  }
}

TEST(an_attempt_to_connect_that_is_reset_is_repeated) {
  Node there("there", 2, kTcp);
  BackendConfig config;
  config.self = {"here", 1};
  config.params = backends_of_ucx()[0].params;
  config.params["UCX_TLS"] = "tcp";
  auto here = std::move(*CHECK_OK(backends_of_ucx()[0].open(std::move(config))));
  auto line = std::move(*CHECK_OK(here->connect({"there", 2}, *CHECK_OK(there.backend->export_connection()))));
  const Deadline deadline = Deadline::after(20'000'000'000);
  while (cut_connections() == 0) {
    CHECK(!deadline.passed());
    (void)here->progress();
  }
  CHECK_OK(line->wait_ready(deadline));
  CHECK_OK(here->notifier()->send(*line, "hello"));
  std::vector<Notification> seen;
  while (seen.empty()) {
    CHECK(!deadline.passed());
    (void)here->progress();
    there.backend->notifier()->drain(seen);
  }
  line.reset();
}

TEST(many_threads_share_one_backend) {
  constexpr int kThreads = 4, kRounds = 60;
  constexpr std::size_t kShare = 64 << 10;
  Node here("here", 1, kTcp), there("there", 2, kTcp);
  std::vector<char> local(kThreads * kShare, 'l'), remote(kThreads * kShare, 'r');
  const auto region = [](std::vector<char>& bytes) {
    return Region{MemKind::kDram, reinterpret_cast<std::uint64_t>(bytes.data()), bytes.size(), 0, ""};
  };
  auto ours = std::move(*CHECK_OK(here.backend->add_region(region(local))));
  auto theirs = std::move(*CHECK_OK(there.backend->add_region(region(remote))));
  auto line = here.connect(there);
  auto imported = std::move(
      *CHECK_OK(here.backend->import_region(*line, region(remote), *CHECK_OK(there.backend->export_region(*theirs)))));
  std::vector<std::unique_ptr<Transfer>> transfers;
  for (int i = 0; i < kThreads; ++i) {
    Plan plan = plan_between(Op::kRead, *line, *ours, *imported);
    add_block(plan, region(local).address + i * kShare, region(remote).address + i * kShare, kShare);
    transfers.push_back(std::move(*CHECK_OK(here.backend->prepare(std::move(plan)))));
  }
  const Deadline deadline = Deadline::after(100'000'000'000);
  std::vector<std::thread> users;
  for (int i = 0; i < kThreads; ++i)
    users.emplace_back([&, i] {
      for (int round = 0; round < kRounds; ++round) {
        auto state = transfers[i]->submit("done");
        while (state && *state == TransferState::kRunning) {
          CHECK(!deadline.passed());
          state = transfers[i]->poll();
        }
        CHECK(state);
        CHECK(local[i * kShare] == 'r' && local[(i + 1) * kShare - 1] == 'r');
        local[i * kShare] = 'l';
        CHECK_OK(here.backend->notifier()->send(*line, "alone"));
        if (round % 8 == 0) CHECK_OK(here.backend->add_region(region(local)));
      }
    });
  std::vector<Notification> seen;
  while (seen.size() < 2u * kThreads * kRounds) {
    CHECK(!deadline.passed());
    there.backend->notifier()->drain(seen);
  }
  for (std::thread& user : users) user.join();
  CHECK_EQ(seen.size(), 2u * kThreads * kRounds);
  transfers.clear();
  imported.reset();
  line.reset();
}

}  // namespace

int main(int argc, char** argv) {
  open_first();
  const Probe probe = backends_of_ucx()[0].probe();
  if (!probe.viable) SKIP(probe.reason.c_str());
  tested = &backends_of_ucx()[0];
  return check::run_tests(argc, argv);
}
