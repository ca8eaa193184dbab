// The pure parts of the agent: coverage, plans, and every reader of bytes from outside, each fed damaged input.
#include <condition_variable>
#include <mutex>
#include <random>
#include <thread>

#include "agent/catalog.h"
#include "agent/desc_codec.h"
#include "agent/exchange.h"
#include "agent/frames.h"
#include "agent/handles.h"
#include "agent/metadata.h"
#include "agent/metrics_page.h"
#include "agent/region_index.h"
#include "agent/router.h"
#include "agent/seal.h"
#include "agent/settings.h"
#include "base/bytes.h"
#include "check.h"
#include "fuzz.h"

using namespace nixl;
using namespace nixl::core;
using check::fuzz;

namespace {

std::shared_ptr<LocalEntry> entry(std::uint64_t address, std::uint64_t length, std::uint64_t device = 0,
                                  MemKind kind = MemKind::kDram) {
  auto made = std::make_shared<LocalEntry>();
  made->region = {kind, address, length, device, ""};
  return made;
}

Metadata sample() {
  Metadata data;
  data.agent = "prefill-0";
  data.incarnation = 42;
  data.revision = 1ull << 40;
  data.complete = true;
  data.home = home_of_this_process();
  data.backends.push_back({"UCX",
                           true,
                           std::string("\0addr", 5),
                           {{{MemKind::kDram, 4096, 64, 0, ""}, "key"}, {{MemKind::kVram, 1, 2, 3, ""}, ""}}});
  data.backends.push_back({"SAME_HOST", false, "", {}});
  return data;
}

// A store whose moments the test chooses: when an answer comes, and when a change is told.
class Scripted : public Store, private StoreWatcher {
 public:
  static inline Scripted* last = nullptr;
  static Result<std::unique_ptr<Store>> open(StoreConfig) {
    auto store = std::make_unique<Scripted>();
    last = store.get();
    return store;
  }
  Result<void> publish(std::string_view key, std::string_view value) override {
    std::unique_lock lock(mutex);
    if (value == slow) {
      publishing = true;
      moved.notify_all();
      moved.wait(lock, [&] { return slow.empty(); });
    }
    if (key.ends_with("metadata")) published = value;
    return {};
  }
  Result<void> withdraw(std::string_view) override { return {}; }
  Result<std::string> fetch(std::string_view key, Deadline deadline) override {
    std::unique_lock lock(mutex);
    asked = true;
    moved.notify_all();
    moved.wait_for(lock, std::chrono::nanoseconds(deadline.left()), [&] { return answer.has_value(); });
    if (!answer) return fail(Code::kTimeout, "no %.*s", static_cast<int>(key.size()), key.data());
    auto value = std::move(*answer);
    answer.reset();
    return value;
  }
  StoreWatcher* watcher() noexcept override { return this; }
  Result<std::unique_ptr<StoreWatch>> watch(std::string_view,
                                            std::function<void(const StoreEvent&)> callback) override {
    tell = std::move(callback);
    return std::make_unique<StoreWatch>();
  }
  std::mutex mutex;
  std::condition_variable moved;
  bool asked = false, publishing = false;
  std::string published, slow;  // publishing `slow` takes until that is cleared
  std::optional<std::string> answer;
  std::function<void(const StoreEvent&)> tell;
};
const StoreEvent kGone = {StoreEvent::Kind::kDelete, "b/metadata", ""};

// An exchange over that store, and what it did to its agent.
struct Exchanging {
  explicit Exchanging(Nanoseconds patience = 5'000'000'000) {
    Exchange::Hooks hooks;
    hooks.agent = "a";
    hooks.load = [this](std::string_view bytes) -> Result<std::string> {
      std::unique_lock lock(mutex);
      loading = true;
      moved.notify_all();
      moved.wait(lock, [&] { return !hold; });
      there = std::string(bytes);
      ++done;
      moved.notify_all();
      return std::string("b");
    };
    hooks.remove = [this](const std::string&) {
      const std::lock_guard lock(mutex);
      there.clear();
      ++done;
      moved.notify_all();
    };
    const Settings settings = *CHECK_OK(Settings::parse("NIXL_ETCD_ENDPOINTS = 'scripted'", "test"));
    Exchange::Options options;
    options.use_etcd = true;
    options.watch_timeout_ns = patience;
    exchange = std::move(*CHECK_OK(Exchange::open(std::move(hooks), options, settings, catalog)));
  }
  void wait(const std::function<bool()>& condition) {
    std::unique_lock lock(mutex);
    CHECK(moved.wait_for(lock, std::chrono::seconds(20), condition));
  }
  std::mutex mutex;
  std::condition_variable moved;
  bool hold = false, loading = false;
  int done = 0;
  std::string there;
  Catalog catalog{{}, {{"etcd", &Scripted::open}}, {}, ""};
  std::unique_ptr<Exchange> exchange;
};

TEST(a_removal_told_while_a_value_is_loaded_comes_after_it) {
  Exchanging e;
  Scripted& store = *Scripted::last;
  e.hold = true;
  store.answer = "fetched";
  e.exchange->fetch_stored("b", "");
  e.wait([&] { return e.loading; });
  store.tell(kGone);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // time for the removal to overtake the load
  {
    const std::lock_guard lock(e.mutex);
    e.hold = false;
    e.moved.notify_all();
  }
  e.wait([&] { return e.done == 2; });
  CHECK_EQ(e.there, std::string());
}

TEST(a_value_that_was_taken_back_while_it_was_fetched_is_none) {
  Exchanging e(300'000'000);
  Scripted& store = *Scripted::last;
  e.exchange->fetch_stored("b", "");
  {
    std::unique_lock lock(store.mutex);
    CHECK(store.moved.wait_for(lock, std::chrono::seconds(20), [&] { return store.asked; }));
  }
  store.tell(kGone);
  e.wait([&] { return e.done == 1; });
  {
    const std::lock_guard lock(store.mutex);
    store.answer = "stale";
    store.moved.notify_all();
  }
  e.exchange.reset();  // lets the fetch end
  CHECK_EQ(e.done, 1);
}

TEST(changes_are_applied_in_the_order_in_which_they_are_told) {
  Exchanging e;
  Scripted& store = *Scripted::last;
  store.answer = "0";
  e.exchange->fetch_stored("b", "");
  e.wait([&] { return e.done == 1; });
  for (int i = 1; i <= 300; ++i) {
    store.tell({StoreEvent::Kind::kPut, "b/metadata", std::to_string(i)});
    store.tell(kGone);
  }
  store.tell({StoreEvent::Kind::kPut, "b/metadata", "last"});
  e.wait([&] { return e.done == 602; });
  CHECK_EQ(e.there, std::string("last"));
}

TEST(of_two_that_publish_the_newer_stays) {
  Exchanging e;
  Scripted& store = *Scripted::last;
  e.exchange->publish("metadata", 2, "two");
  e.exchange->publish("metadata", 1, "one");
  CHECK_EQ(store.published, std::string("two"));
  e.exchange->publish("metadata", 2, "two again");
  CHECK_EQ(store.published, std::string("two again"));
  store.slow = "four";
  std::thread newer([&] { e.exchange->publish("metadata", 4, "four"); });
  {
    std::unique_lock lock(store.mutex);
    CHECK(store.moved.wait_for(lock, std::chrono::seconds(20), [&] { return store.publishing; }));
  }
  std::thread older([&] { e.exchange->publish("metadata", 3, "three"); });
  std::this_thread::sleep_for(std::chrono::milliseconds(50));  // time for the older to come to wait
  {
    const std::lock_guard lock(store.mutex);
    store.slow.clear();
    store.moved.notify_all();
  }
  newer.join();
  older.join();
  CHECK_EQ(store.published, std::string("four"));
}

}  // namespace

TEST(usage_hands_destruction_to_exactly_one) {
  Usage usage;
  CHECK(usage.acquire() && usage.acquire());
  CHECK(!usage.retire());
  CHECK(!usage.acquire());
  CHECK(!usage.release());
  CHECK(usage.release());
  Usage idle;
  CHECK(idle.retire());
}

TEST(coverage_finds_nested_and_overlapping_regions) {
  RegionIndex<LocalEntry> index;
  for (const auto& [address, length, device] :
       {std::tuple(1000, 1000, 0), std::tuple(1100, 10, 0), std::tuple(1105, 10, 0), std::tuple(1000, 50, 1),
        std::tuple(5000, 0, 0)})
    index.put(entry(address, length, device));
  const auto view = index.snapshot(MemKind::kDram);
  const auto holder = [&](std::uint64_t address, std::uint64_t length, std::uint64_t device) -> std::uint64_t {
    const auto place = view->find(device, address, length);
    return place == view->kNone ? 0 : (*view)[place]->region.length;
  };
  CHECK_EQ(holder(1105, 8, 0), 10u);
  CHECK_EQ(holder(1108, 100, 0), 1000u);
  CHECK_EQ(holder(1999, 1, 0), 1000u);
  CHECK_EQ(holder(1999, 2, 0), 0u);
  CHECK_EQ(holder(999, 2, 0), 0u);
  CHECK_EQ(holder(1000, 51, 1), 0u);
  CHECK_EQ(holder(1000, UINT64_MAX, 0), 0u);
  CHECK_EQ(holder(5000, 1, 0), 0u);  // length 0 is literal for memory
  RegionIndex<LocalEntry> files;
  files.put(entry(0, 0, 5, MemKind::kFile));
  const auto unbounded = files.snapshot(MemKind::kFile);
  CHECK_EQ(unbounded->find(5, 1ull << 40, 4096), 0u);
  CHECK(unbounded->find(6, 0, 1) == unbounded->kNone);
}

TEST(coverage_agrees_with_a_plain_search) {
  std::mt19937_64 random(3);
  for (int round = 0; round < 200; ++round) {
    RegionIndex<LocalEntry> index;
    std::vector<Region> all;
    for (int i = 0; i < 12; ++i) {
      const Region region{MemKind::kDram, random() % 200, random() % 60, random() % 2, ""};
      all.push_back(region);
      index.put(entry(region.address, region.length, region.device));
    }
    const auto view = index.snapshot(MemKind::kDram);
    for (int i = 0; i < 200; ++i) {
      const std::uint64_t address = random() % 250, length = random() % 40, device = random() % 2;
      bool expected = false;
      for (const Region& region : all)
        expected |=
            region.device == device && region.address <= address && address + length <= region.address + region.length;
      const auto place = view->find(device, address, length);
      CHECK_EQ(place != view->kNone, expected);
      if (expected) CHECK(view->item(place).holds(device, address, length));
    }
  }
}

TEST(touching_regions_join) {
  RegionIndex<LocalEntry> index;
  for (const auto& [address, length, device] : {std::tuple(0, 100, 0), std::tuple(100, 50, 0), std::tuple(120, 10, 0),
                                                std::tuple(140, 60, 0), std::tuple(201, 10, 0), std::tuple(200, 50, 1)})
    index.put(entry(address, length, device));
  const auto view = index.snapshot(MemKind::kDram);
  CHECK(view->spans(0, 10, 190) && view->spans(0, 0, 200) && view->spans(0, 110, 40));
  CHECK(!view->spans(0, 0, 201) && !view->spans(0, 150, 60) && !view->spans(1, 199, 2) &&
        !view->spans(0, 10, UINT64_MAX) && !view->spans(0, 300, 0));
  CHECK_EQ(view->item(view->furthest(0, 125)).end, 150u);
  CHECK_EQ(view->item(view->furthest(0, 145)).end, 200u);
  CHECK(view->furthest(0, 200) == view->kNone && view->furthest(2, 0) == view->kNone);
}

TEST(columns_share_until_written) {
  Column a;
  for (const std::uint64_t value : {5, 5, 5}) a.push_back(value);
  CHECK(a.uniform());
  a.push_back(6);
  Column b = a;
  b.set(0, 9);
  CHECK_EQ(a[0], 5u);
  CHECK_EQ(b[0], 9u);
  b.erase(0);
  CHECK_EQ(b.size(), 3u);
  CHECK_EQ(b[2], 6u);
  CHECK(!(a == b));
  a.clear();
  CHECK(a.size() == 0 && a.uniform());
}

TEST(handles_are_never_used_twice) {
  Handles<int, HandleKind::kList> handles;
  const auto first = handles.add(std::make_shared<int>(1));
  CHECK_EQ(*handles.get(first), 1);
  CHECK(handles.take(first) && !handles.take(first) && !handles.get(first));
  const auto second = handles.add(std::make_shared<int>(2));
  CHECK(second != first && !handles.get(first) && !handles.get(0) && !handles.get(~0ull));
  Handles<int, HandleKind::kRequest> others;
  CHECK(others.add(std::make_shared<int>(3)) != first && !others.get(first) &&
        !handles.get(others.add(std::make_shared<int>(4))));
}

TEST(metadata_round_trip_and_damage) {
  const std::string good = encode(sample());
  const Metadata back = *CHECK_OK(decode(good));
  CHECK_EQ(back.agent, "prefill-0");
  CHECK_EQ(back.incarnation, 42u);
  CHECK_EQ(back.revision, 1ull << 40);
  CHECK(back.complete);
  CHECK_EQ(back.backends.size(), 2u);
  CHECK(back.backends[0].connection == std::string("\0addr", 5));
  CHECK_EQ(back.backends[0].regions[1].region.device, 3u);
  fuzz(good, [&](const std::string& bytes) {
    const auto seen = decode(bytes);
    CHECK(bytes == good || !seen);  // the checksum tells every change
    if (!seen) CHECK(seen.error().code == Code::kMismatch && !seen.error().reason.empty());
  });
  std::string first_version = good;
  first_version[8] = 1;
  CHECK_EQ(decode(first_version).error().reason, "agent metadata of version 1; this library reads version 2");
  // The payload's own reader, with the checksum made right each time.
  const std::string payload = good.substr(24);
  fuzz(payload, [&](const std::string& bytes) {
    std::string whole = good.substr(0, 12);
    const std::uint64_t length = bytes.size();
    const std::uint32_t checksum = crc32c(bytes);
    whole.append(reinterpret_cast<const char*>(&length), 8)
        .append(reinterpret_cast<const char*>(&checksum), 4)
        .append(bytes);
    (void)decode(whole);
  });
}

TEST(own_process_is_not_dead) {
  Home home = home_of_this_process();
  CHECK(!surely_dead(home));
  home.started += 1;
  CHECK(surely_dead(home));
  home.host += "elsewhere";
  CHECK(!surely_dead(home));
}

TEST(descriptor_lists_round_trip_and_damage) {
  Descs descs(MemType::OBJECT);
  for (std::uint64_t i = 0; i < 20; ++i) descs.add(i * 7, 64, 0, "key" + std::to_string(i));
  const std::string good = encode_descs(descs, 1);
  std::uint8_t list_class = 9;
  CHECK(*CHECK_OK(decode_descs(good, list_class)) == descs);
  CHECK_EQ(list_class, 1);
  fuzz(good, [](const std::string& bytes) {
    std::uint8_t seen_class = 0;
    const auto seen = decode_descs(bytes, seen_class);
    if (seen) CHECK(seen->addr.size() == seen->len.size() && seen->len.size() == seen->dev.size());
  });
}

TEST(frames_in_any_cut_and_damage) {
  const std::string two = encode_frame(Verb::kLoad, "NIXLCOMM:INVL inside") + encode_frame(Verb::kInvalidate, "name");
  FrameReader reader;
  std::vector<Frame> seen;
  for (const char byte : two) {
    reader.append(&byte, 1);
    while (auto frame = *CHECK_OK(reader.next())) seen.push_back(*frame);
  }
  CHECK_EQ(seen.size(), 2u);
  CHECK(seen[0].verb == Verb::kLoad && seen[0].body == "NIXLCOMM:INVL inside" && seen[1].body == "name");
  fuzz(two, [](const std::string& bytes) {
    FrameReader damaged;
    damaged.append(bytes.data(), bytes.size());
    for (int i = 0; i < 3; ++i) {
      const auto frame = damaged.next();
      if (!frame || !*frame) break;
    }
  });
}

TEST(sealed_frames_open_once_with_the_secret_and_in_order) {
  const std::string a = Seal::nonce(), b = Seal::nonce();
  CHECK(a != b && a.size() == Seal::kNonceBytes);
  const auto carried = [](const std::string& bytes) {
    FrameReader reader;
    reader.append(bytes.data(), bytes.size());
    return **CHECK_OK(reader.next());
  };
  Seal caller("s3cret", Seal::Side::kCaller, a, b), listener("s3cret", Seal::Side::kListener, a, b);
  const Frame first = carried(caller.close(encode_frame(Verb::kLoad, "one"))),
              second = carried(caller.close(encode_frame(Verb::kSend, "")));
  CHECK_EQ(CHECK_OK(listener.open(first))->body, "one");
  CHECK(!listener.open(first));  // played again
  Seal other("secret", Seal::Side::kListener, a, b), elsewhere("s3cret", Seal::Side::kListener, b, a);
  Seal mirror("s3cret", Seal::Side::kCaller, a, b), late("s3cret", Seal::Side::kListener, a, b);
  CHECK(!other.open(first) && !elsewhere.open(first) && !mirror.open(first) && !late.open(second));
  CHECK(!late.open(Frame{Verb::kLoad, "plain"}));
  fuzz(first.body, [&](const std::string& bytes) {
    Seal fresh("s3cret", Seal::Side::kListener, a, b);
    CHECK(bytes == first.body || !fresh.open({Verb::kSealed, bytes}));
  });
}

TEST(settings_of_a_file_and_damage) {
  const std::string text = "# top\nA = \"x # y\" # comment\nB = 12\nC = true\n[table]\nA = 3\n";
  const Settings settings = *CHECK_OK(Settings::parse(text, "file"));
  CHECK_EQ(*settings.text("A"), "x # y");
  CHECK_EQ(**CHECK_OK(settings.number("B")), 12);
  CHECK(**CHECK_OK(settings.flag("C")));
  CHECK(!settings.text("D"));
  CHECK_EQ(Settings::parse("A = \"open\nB = 1", "file").error().reason, "file line 1: the string is not closed");
  CHECK(!Settings::parse("A = word", "f") && !Settings::parse("= 1", "f") && !Settings::parse("A", "f"));
  fuzz(text, [](const std::string& bytes) { (void)Settings::parse(bytes, "fuzz"); });
}

TEST(pages_of_other_processes_and_damage) {
  const std::string page = "# TYPE a counter\na{agent_name=\"x\"} 1\n# TYPE b gauge\nb{agent_name=\"x\"} 2\n";
  const std::string both[] = {page, "# TYPE b gauge\nb{agent_name=\"y\"} 3\n"};
  CHECK_EQ(merge_pages(both), page + "b{agent_name=\"y\"} 3\n");
  fuzz(page, [&](const std::string& bytes) {
    const std::string pages[] = {page, bytes};
    const std::string merged = merge_pages(pages);
    // What is whole stays whole, however the other page is damaged.
    CHECK(merged.find("a{agent_name=\"x\"} 1\n") != std::string::npos && merged.ends_with('\n'));
  });
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
