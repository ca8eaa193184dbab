// The public face with ranks as threads of one process: membership, masks, errors, and joins under traffic.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <optional>
#include <thread>

#include "check.h"
#include "nixl/ep.h"

using namespace nixl::ep;

namespace {

constexpr int kExperts = 2, kTopk = 2;
constexpr std::int64_t kTokens = 6, kHidden = 128;

class MapStore final : public Store {
 public:
  void set(const std::string& key, const std::string& value) override {
    const std::lock_guard lock(mutex_);
    values_[key] = value;
    changed_.notify_all();
  }
  bool wait(const std::string& key, std::int64_t timeout_ms) override {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [&] { return values_.count(key) > 0; });
  }
  std::string get(const std::string& key) override {
    const std::lock_guard lock(mutex_);
    return values_.at(key);
  }
  void remove(const std::string& key) override {
    const std::lock_guard lock(mutex_);
    values_.erase(key);
  }
  std::size_t size() {
    const std::lock_guard lock(mutex_);
    return values_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
};

class BrokenStore final : public Store {
 public:
  void set(const std::string&, const std::string&) override { throw std::runtime_error("out of order"); }
  bool wait(const std::string&, std::int64_t) override { return false; }
  std::string get(const std::string&) override { return ""; }
  void remove(const std::string&) override {}
};

// Its end waits for another thread that asks the buffer: a caller's store may hold what such a thread has, as Python's does.
class AskingStore final : public Store {
 public:
  AskingStore(const Buffer& buffer, int& answers) : buffer_(buffer), answers_(answers) {}
  ~AskingStore() override {
    std::promise<void> asked;
    std::thread asker([&] {
      try {
        (void)buffer_.connected_ranks();
        (void)buffer_.active_rank_bound();
      } catch (const Error&) {  // destroyed
      }
      asked.set_value();
    });
    if (asked.get_future().wait_for(std::chrono::seconds(10)) != std::future_status::ready) std::abort();
    asker.join();
    ++answers_;
  }
  void set(const std::string&, const std::string&) override {}
  bool wait(const std::string&, std::int64_t) override { return false; }
  std::string get(const std::string&) override { return ""; }
  void remove(const std::string&) override {}

 private:
  const Buffer& buffer_;
  int& answers_;
};

Options options_of(int rank, std::int64_t timeout_ms = 20'000, std::int64_t connect_timeout_ms = 20'000) {
  Options options;
  options.rank = rank;
  options.timeout_ms = timeout_ms;
  options.connect_timeout_ms = connect_timeout_ms;
  return options;
}

std::uint16_t bf16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<std::uint16_t>(bits >> 16);
}

// One rank with the tensors of its operations; capacity ranks of kExperts experts.
struct Rank {
  Rank(const Options& options, int capacity, std::shared_ptr<Store> store) : buffer(options), rank(options.rank) {
    resize(capacity);
    buffer.set_store(std::move(store));
  }
  void resize(int ranks) {
    capacity = ranks;
    buffer.update_memory(ranks, kExperts, size_hint(kTokens, kHidden, ranks, ranks * kExperts));
    rows = capacity * kTokens;
    recv_x.assign(kExperts * rows * kHidden, 0);
    recv_count.assign(kExperts, 0);
    src_info.assign(kExperts * rows, 0);
    layout_range.assign(kExperts * capacity, 0);
  }
  Dispatch dispatch_args() {
    Dispatch args;
    args.x = x.data();
    args.num_tokens = kTokens;
    args.hidden = kHidden;
    args.topk_idx = topk_idx.data();
    args.topk = kTopk;
    args.max_tokens = kTokens;
    args.num_ranks = capacity;
    args.recv_x = recv_x.data();
    args.recv_count = recv_count.data();
    args.src_info = src_info.data();
    args.layout_range = layout_range.data();
    return args;
  }
  CombineArgs combine_args() {
    CombineArgs args;
    args.x = recv_x.data();
    args.num_tokens = kTokens;
    args.hidden = kHidden;
    args.topk_idx = topk_idx.data();
    args.topk = kTopk;
    args.topk_weights = weights.data();
    args.src_info = src_info.data();
    args.layout_range = layout_range.data();
    args.max_tokens = kTokens;
    args.num_ranks = capacity;
    args.out = out.data();
    return args;
  }
  // Every token goes to expert 0 of one target and expert 1 of the next; experts answer with what they got, so that the
  // sum is the token times the weights of the targets that answered.
  void operate(const std::vector<int>& targets, int round) {
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t h = 0; h < kHidden; ++h)
        x[t * kHidden + h] = bf16(static_cast<float>(1 + (rank + t + round) % 7));
      for (int k = 0; k < kTopk; ++k) topk_idx[t * kTopk + k] = targets[(t + k) % targets.size()] * kExperts + k;
    }
    buffer.dispatch(dispatch_args());
    buffer.combine(combine_args());
    for (std::int64_t i = 0; i < kTokens * kHidden; ++i) CHECK_EQ(out[i], x[i]);  // 0.5 + 0.5
  }
  std::vector<std::int32_t> masks() {
    std::vector<std::int32_t> values(capacity, 7);
    buffer.query_masks(values.data(), nullptr);
    return values;
  }

  Buffer buffer;
  int rank, capacity = 0;
  std::int64_t rows = 0;
  std::vector<std::uint16_t> x = std::vector<std::uint16_t>(kTokens * kHidden), recv_x, out = x;
  std::vector<std::int64_t> topk_idx = std::vector<std::int64_t>(kTokens * kTopk, -1), layout_range;
  std::vector<float> weights = std::vector<float>(kTokens * kTopk, 0.5f);
  std::vector<std::int32_t> recv_count, src_info;
};

void together(const std::vector<std::function<void()>>& bodies) {
  std::vector<std::thread> threads;
  for (const auto& body : bodies) threads.emplace_back(body);
  for (auto& thread : threads) thread.join();
}

std::string error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}
#define CHECK_ERROR(text, body)                                                                                  \
  do {                                                                                                           \
    const std::string got = error_of([&] { body; });                                                             \
    if (got.find(text) == std::string::npos) check::failed(__FILE__, __LINE__, "not in \"" + got + "\": " text); \
  } while (0)

using Ints = std::vector<int>;
using Masks = std::vector<std::int32_t>;

}  // namespace

TEST(ranks_connect_operate_and_leave) {
  auto store = std::make_shared<MapStore>();
  Rank a(options_of(0), 3, store), b(options_of(1), 3, store);
  CHECK_EQ(a.buffer.active_rank_bound(), 1);
  CHECK(a.masks() == Masks({0, -1, -1}));
  together({[&] { CHECK(a.buffer.connect({0, 1}, true) == Ints({1})); }, [&] { b.buffer.connect({1, 0}, true); }});
  CHECK(a.buffer.connect({1}, true).empty());
  CHECK(a.masks() == Masks({0, 0, -1}));
  CHECK_EQ(a.buffer.active_rank_bound(), 2);
  CHECK(a.buffer.active_ranks() == Ints({0, 1}) && a.buffer.connected_ranks() == Ints({1}));
  together({[&] {
              for (int i = 0; i < 3; ++i) a.operate({0, 1}, i);
            },
            [&] {
              for (int i = 0; i < 3; ++i) b.operate({1, 0}, i);
            }});
  together({[&] { a.buffer.barrier(nullptr); }, [&] { b.buffer.barrier(nullptr); }});
  a.buffer.disconnect({1});
  CHECK(a.masks()[1] != 0);
  CHECK_EQ(a.buffer.active_rank_bound(), 1);
  CHECK(a.buffer.connected_ranks().empty());
  a.operate({0}, 9);
  CHECK_EQ(store->size(), 0u);
}

TEST(a_rank_joins_from_another_thread_under_traffic) {
  auto store = std::make_shared<MapStore>();
  Rank a(options_of(0), 4, store), b(options_of(1), 4, store);
  together({[&] { a.buffer.connect({1}, true); }, [&] { b.buffer.connect({0}, true); }});
  Rank c(options_of(3), 4, store);
  std::atomic<int> joined{0}, rounds{0};
  const auto serve = [&](Rank& me) {
    // Both must stop at the same round: the one after which both joins had returned when rank 0 looked.
    static std::atomic<int> last;
    if (me.rank == 0) last = -1;
    together({[&] {
                me.buffer.connect({3}, false);
                ++joined;
              },
              [&] {
                for (int round = 0;; ++round) {
                  if (me.rank == 0 && joined == 3 && last < 0) last = round + 2;
                  me.operate({0, 1}, round);
                  if (last >= 0 && round >= last) return void(rounds = round);
                }
              }});
  };
  together({[&] { serve(a); }, [&] { serve(b); },
            [&] {
              c.buffer.connect({0, 1}, false);
              ++joined;
            }});
  CHECK(rounds >= 2);
  for (Rank* rank : {&a, &b}) {
    CHECK_EQ(rank->buffer.active_rank_bound(), 2);
    CHECK_EQ(rank->masks()[3], 1);
    rank->buffer.mask({3}, false, nullptr);
    CHECK_EQ(rank->buffer.active_rank_bound(), 4);
  }
  c.buffer.clean_masks(nullptr);
  together({[&] { a.operate({0, 3}, 1); }, [&] { b.operate({3, 1}, 1); }, [&] { c.operate({3, 0}, 1); }});
}

TEST(capacity_grows_in_place) {
  auto store = std::make_shared<MapStore>();
  Rank a(options_of(0), 2, store), b(options_of(1), 2, store);
  together({[&] { a.buffer.connect({1}, true); }, [&] { b.buffer.connect({0}, true); }});
  together({[&] { a.operate({0, 1}, 0); }, [&] { b.operate({0, 1}, 0); }});
  CHECK_ERROR("0 to 1 are allowed", a.buffer.connect({2}, true));
  a.resize(5);
  b.resize(5);
  together({[&] { a.operate({0, 1}, 1); }, [&] { b.operate({0, 1}, 1); }});
  Rank c(options_of(4), 5, store);
  together({[&] { a.buffer.connect({4}, true); }, [&] { b.buffer.connect({4}, true); },
            [&] {
              c.buffer.connect({0, 1}, true);
            }});
  together({[&] { a.operate({0, 4}, 2); }, [&] { b.operate({4, 1}, 2); }, [&] { c.operate({4, 1}, 2); }});
  CHECK_ERROR("Multiple calls to update_memory_buffers are not supported", a.buffer.update_memory(5, 3, 1 << 20));
  CHECK_ERROR("Multiple calls", a.buffer.update_memory(4, kExperts, 1 << 30));
}

TEST(masks_follow_their_rules) {
  auto store = std::make_shared<MapStore>();
  Rank a(options_of(0), 3, store), b(options_of(1), 3, store);
  together({[&] { a.buffer.connect({1}, true); }, [&] { b.buffer.connect({0}, true); }});
  CHECK_ERROR("always active", a.buffer.mask({0}, true, nullptr));
  CHECK_ERROR("rank 2 is not connected", a.buffer.mask({2}, false, nullptr));
  CHECK_ERROR("0 to 2 are allowed", a.buffer.mask({3}, true, nullptr));
  a.buffer.mask({2}, true, nullptr);  // not connected: masked already
  a.buffer.mask({1, 2}, true, nullptr);
  CHECK_EQ(a.masks()[1], 1);
  CHECK_EQ(a.buffer.active_rank_bound(), 1);
  a.buffer.clean_masks(nullptr);
  CHECK_EQ(a.masks()[1], 0);
  CHECK(a.masks()[2] != 0);
  CHECK_EQ(a.buffer.active_rank_bound(), 2);
}

TEST(a_rank_that_does_not_come_is_masked_and_named) {
  auto store = std::make_shared<MapStore>();
  Rank a(options_of(0, 100), 2, store), b(options_of(1, 100), 2, store);
  together({[&] { a.buffer.connect({1}, true); }, [&] { b.buffer.connect({0}, true); }});
  a.buffer.barrier(nullptr);
  CHECK(a.masks() == Masks({0, 1}));
  CHECK_EQ(a.buffer.active_rank_bound(), 2);  // by the host
  const auto faults = a.buffer.take_faults();
  CHECK_EQ(faults.size(), 1u);
  CHECK_EQ(faults[0].rank, 1);
  CHECK(faults[0].phase == Phase::kBarrier);
  CHECK(a.buffer.take_faults().empty());
  a.operate({0}, 0);
}

TEST(numbers_that_name_nothing_are_refused) {
  Options wrong;
  wrong.device = static_cast<Device>(7);
  CHECK_ERROR("device is 7; 0 (the CPU) and 1 (CUDA) are known", Buffer{wrong});
  wrong = Options();
  wrong.combine = static_cast<Combine>(2);
  CHECK_ERROR("combine is 2; 0 (exact) and 1 (reduced) are known", Buffer{wrong});
  Buffer alone{Options()};
  alone.update_memory(1, 1, 1 << 20);
  CHECK_ERROR("query_masks: out is null", alone.query_masks(nullptr, nullptr));
  CHECK_ERROR("top-k is 33; 1 to 32 are allowed", record_bytes(Device::kCpu, 1, 33, 1));
}

TEST(wrong_calls_are_refused_and_the_buffer_stays_usable) {
  CHECK_ERROR("rank is -1", Buffer(options_of(-1)));
  CHECK_ERROR("timeout_ms is -5", Buffer(options_of(0, -5)));
  CHECK_ERROR("all must be positive", size_hint(0, 128, 2, 4));
  Buffer young(options_of(2));
  CHECK_ERROR("call update_memory first", young.connect({1}, true));
  CHECK_ERROR("call update_memory first", young.barrier(nullptr));
  CHECK_ERROR("above this rank, 2", young.update_memory(2, kExperts, 1 << 20));
  CHECK_ERROR("multiple of 128", young.update_memory(4, kExperts, 100));
  CHECK_ERROR("experts per rank are 0", young.update_memory(4, 0, 1 << 20));

  Rank a(options_of(0, 100, 100), 2, nullptr);
  CHECK_ERROR("no store to meet rank 1 in", a.buffer.connect({1}, true));
  a.buffer.set_store(std::make_shared<BrokenStore>());
  CHECK_ERROR("out of order", a.buffer.connect({1}, true));
  CHECK_ERROR("the list of ranks is empty", a.buffer.connect({}, true));
  CHECK_ERROR("rank 1 is not connected", a.buffer.disconnect({1}));
  CHECK_ERROR("this rank itself", a.buffer.disconnect({0}));
  a.operate({0}, 0);
  struct Wrong {
    const char* text;
    std::function<void(Dispatch&)> change;
  };
  const Wrong wrong_dispatches[] = {
      {"num_tokens is 7", [](Dispatch& d) { d.num_tokens = 7; }},
      {"num_tokens is -1", [](Dispatch& d) { d.num_tokens = -1; }},
      {"multiples of 8 up to 16384", [](Dispatch& d) { d.hidden = 100; }},
      {"multiples of 512", [](Dispatch& d) { d.payload = Payload::kFp8Ue8m0; }},
      {"top-k is 33", [](Dispatch& d) { d.topk = 33; }},
      {"have 2 bytes", [](Dispatch& d) { d.index_bytes = 2; }},
      {"covers 3 ranks", [](Dispatch& d) { d.num_ranks = 3; }},
      {"covers 0 ranks", [](Dispatch& d) { d.num_ranks = 0; }},
      {"needs a buffer of", [](Dispatch& d) { d.max_tokens = 100; }},
      {"max_tokens is 0", [](Dispatch& d) { d.max_tokens = 0; }},
      {"1 to 134217727 are allowed", [](Dispatch& d) { d.max_tokens = 134217728; }},
      {"x is null", [](Dispatch& d) { d.x = nullptr; }},
      {"topk_idx is null", [](Dispatch& d) { d.topk_idx = nullptr; }},
      {"recv_x is null", [](Dispatch& d) { d.recv_x = nullptr; }},
      {"recv_scales is null", [](Dispatch& d) { d.payload = Payload::kFp8; }},
      {"recv_weights needs recv_places", [&](Dispatch& d) { d.recv_weights = a.weights.data(); }},
      {"payload is 9", [](Dispatch& d) { d.payload = static_cast<Payload>(9); }},
  };
  for (const Wrong& wrong : wrong_dispatches) {
    Dispatch args = a.dispatch_args();
    wrong.change(args);
    const std::string got = error_of([&] { a.buffer.dispatch(args); });
    if (got.find(wrong.text) == std::string::npos)
      check::failed(__FILE__, __LINE__, got + " does not say " + wrong.text);
  }
  Dispatch received = a.dispatch_args();
  received.recv_count = nullptr;
  CHECK_ERROR("recv_count is null", a.buffer.dispatch_recv(received));
  CombineArgs combine = a.combine_args();
  combine.layout_range = nullptr;
  CHECK_ERROR("layout_range is null", a.buffer.combine_recv(combine));
  combine = a.combine_args();
  combine.zero_copy = combine.logfmt = true;
  CHECK_ERROR("exclude each other", a.buffer.combine(combine));
  CHECK_ERROR("needs a buffer of", a.buffer.next_combine_buffer(1000, kHidden, 2));
  a.operate({0}, 1);
  a.buffer.destroy();
  CHECK_ERROR("was destroyed", a.buffer.barrier(nullptr));
  CHECK_ERROR("was destroyed", a.buffer.set_store(nullptr));
  a.buffer.destroy();  // again: nothing left to do
}

TEST(destroy_ends_a_wait_and_a_connect_of_other_threads) {
  auto store = std::make_shared<MapStore>();
  std::optional<Rank> a(std::in_place, options_of(0, 60'000, 60'000), 3, store);
  Rank b(options_of(1, 60'000), 3, store);
  together({[&] { a->buffer.connect({1}, true); }, [&] { b.buffer.connect({0}, true); }});
  const auto start = std::chrono::steady_clock::now();
  together({[&] { (void)error_of([&] { a->buffer.barrier(nullptr); }); },  // rank 1 does not come
            [&] { CHECK_ERROR("cancelled", a->buffer.connect({2}, true)); },
            [&] {
              while (store->size() == 0) std::this_thread::yield();
              a->buffer.destroy();
            }});
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(30));
  CHECK_EQ(store->size(), 0u);
}

// Runs something inside connect, as a signal handler does that is called between two steps of a store.
class InterruptedStore final : public Store {
 public:
  explicit InterruptedStore(std::function<void()> interrupt) : interrupt_(std::move(interrupt)) {}
  void set(const std::string&, const std::string&) override {}
  bool wait(const std::string&, std::int64_t) override {
    interrupt_();
    return false;
  }
  std::string get(const std::string&) override { return ""; }
  void remove(const std::string&) override {}

 private:
  const std::function<void()> interrupt_;
};

TEST(destroy_and_connect_from_inside_a_connect) {
  Buffer buffer(options_of(0));
  buffer.update_memory(2, kExperts, 1 << 20);
  const auto interrupt = [&] {
    CHECK_ERROR("this thread is inside a connect of the same buffer", buffer.connect({1}, true));
    buffer.destroy();
  };
  buffer.set_store(std::make_shared<InterruptedStore>(interrupt));
  CHECK_ERROR("destroyed", buffer.connect({1}, true));
  CHECK_ERROR("the buffer of rank 0 was destroyed", buffer.connected_ranks());
}

TEST(no_lock_is_held_while_a_store_ends) {
  int answers = 0;
  Buffer buffer(options_of(0));
  buffer.set_store(std::make_shared<AskingStore>(buffer, answers));
  buffer.set_store(std::make_shared<AskingStore>(buffer, answers));
  buffer.update_memory(2, kExperts, 1 << 20);
  buffer.set_store(std::make_shared<AskingStore>(buffer, answers));
  buffer.update_memory(3, kExperts, 1 << 20);
  buffer.set_store(nullptr);
  buffer.set_store(std::make_shared<AskingStore>(buffer, answers));
  CHECK_EQ(answers, 3);
  buffer.destroy();
  CHECK_EQ(answers, 4);
}

TEST(a_forked_child_changes_nothing_for_its_parent) {
  auto store = std::make_shared<MapStore>();
  auto a = std::make_unique<Rank>(options_of(0), 2, store), b = std::make_unique<Rank>(options_of(1), 2, store);
  together({[&] { a->buffer.connect({1}, true); }, [&] { b->buffer.connect({0}, true); }});
  const auto both = [&](int round) {
    together({[&] { a->operate({0, 1}, round); }, [&] { b->operate({1, 0}, round); }});
  };
  both(0);
  // Between the phases, so that there is a message which the child could take back.
  a->buffer.dispatch_send(a->dispatch_args());
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);  // instead of a wait for threads that are not there
    CHECK_ERROR("rank 0 belongs to the parent process", a->buffer.mask({1}, true, nullptr));
    CHECK_ERROR("rank 0 belongs to the parent process", a->operate({0}, 1));
    CHECK_ERROR("rank 0 belongs to the parent process", a->buffer.connect({1}, true));
    a->buffer.destroy();
    a.reset();
    b.reset();
    Rank own(options_of(0), 1, nullptr);
    own.operate({0}, 2);
    ::_exit(0);
  }
  int status = -1;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  together({[&] {
              a->buffer.dispatch_recv(a->dispatch_args());
              a->buffer.combine(a->combine_args());
            },
            [&] {
              b->operate({1, 0}, 0);
            }});
  CHECK(a->masks() == Masks({0, 0}) && b->masks() == Masks({0, 0}));
  CHECK(a->buffer.take_faults().empty() && b->buffer.take_faults().empty());
  for (int round = 1; round < 4; ++round) both(round);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
