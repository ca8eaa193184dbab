#include "stores/memory/memory.h"

#include <thread>

#include "check.h"

using namespace nixl::core;

TEST(keys_come_and_go) {
  auto store = std::move(*CHECK_OK(store_memory().open({"keys", 0, 0, 0})));
  auto same = std::move(*CHECK_OK(store_memory().open({"keys", 0, 0, 0})));
  auto other = std::move(*CHECK_OK(store_memory().open({"other", 0, 0, 0})));
  CHECK_OK(store->publish("k", std::string("\0v", 2)));
  CHECK_EQ(*CHECK_OK(same->fetch("k", Deadline::passed_already())), std::string("\0v", 2));
  CHECK_OK(store->publish("k", "new"));
  CHECK_EQ(*CHECK_OK(same->fetch("k", Deadline::passed_already())), "new");
  auto absent = other->fetch("k", Deadline::passed_already());
  CHECK(!absent && absent.error().code == Code::kTimeout);
  CHECK(absent.error().reason.find("'k'") != std::string::npos);
  CHECK_OK(same->withdraw("k"));
  CHECK_OK(same->withdraw("k"));
  CHECK(!store->fetch("k", Deadline::after(1'000'000)));
}

TEST(fetch_waits_for_a_publisher) {
  MemoryStore store;
  std::thread publisher([&] {
    CHECK_OK(store.publish("unrelated", ""));
    CHECK_OK(store.publish("k", "v"));
  });
  CHECK_EQ(*CHECK_OK(store.fetch("k", Deadline::after(10'000'000'000))), "v");
  publisher.join();
  CHECK_EQ(store.size(), 2u);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
