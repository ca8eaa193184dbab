#include "ep/group/group.h"

#include "check.h"
#include "ep/group/test_group.h"
#include "fuzz.h"
#include "stores/memory/memory.h"

using namespace nixl::core;
using namespace nixl::core::ep;
using namespace nixl::core::ep::test;

namespace {

// A store whose functions fail when told to.
class FailingStore final : public Store {
 public:
  Result<void> publish(std::string_view key, std::string_view value) override {
    if (fail_publish) return fail(Code::kIo, "store told to fail at publish");
    return inner.publish(key, value);
  }
  Result<std::string> fetch(std::string_view key, Deadline deadline) override {
    if (fail_fetch) return fail(Code::kIo, "store told to fail at fetch");
    return inner.fetch(key, deadline);
  }
  Result<void> withdraw(std::string_view key) override {
    CHECK_OK(inner.withdraw(key));
    if (fail_withdraw) return fail(Code::kIo, "store told to fail at withdraw");
    return {};
  }
  MemoryStore inner;
  std::atomic<bool> fail_publish{false}, fail_fetch{false}, fail_withdraw{false};
};

}  // namespace

TEST(all_connect_with_all_in_any_order) {
  auto store = std::make_shared<MemoryStore>();
  constexpr int kRanks = 9;
  std::vector<std::unique_ptr<Rank>> ranks;
  std::vector<std::function<void()>> bodies;
  std::set<int> everyone;
  for (int r = 0; r < kRanks; ++r) {
    ranks.push_back(std::make_unique<Rank>(r, store));
    everyone.insert(r);
  }
  for (int r = 0; r < kRanks; ++r)
    bodies.push_back([&, r] {
      std::vector<int> list;
      for (int i = 0; i < kRanks; ++i) list.push_back((r * 5 + i * 4) % kRanks);  // 4 and 9 have no common factor
      list.push_back(r);
      CHECK_EQ(CHECK_OK(ranks[r]->group->connect(list))->size(), std::size_t(kRanks - 1));
    });
  together(bodies);
  for (int r = 0; r < kRanks; ++r) {
    std::set<int> others = everyone;
    others.erase(r);
    expect_connected(*ranks[r], others);
    for (int other : others) CHECK_EQ(ranks[r]->memory.incarnation_of(other), ranks[other]->incarnation);
  }
  CHECK_EQ(store->size(), 0u);
}

TEST(the_own_rank_and_members_are_skipped) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store), b(1, store);
  CHECK(CHECK_OK(a.group->connect({0}))->empty());
  together({[&] { CHECK_OK(a.group->connect({0, 1})); }, [&] { CHECK_OK(b.group->connect({0, 1})); }});
  CHECK(CHECK_OK(a.group->connect({0, 1}))->empty());  // at once: the peer does not take part
  expect_connected(a, {1});
}

TEST(a_group_grows_and_shrinks) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store), b(1, store), c(7, store);
  together({[&] { CHECK_OK(a.group->connect({1})); }, [&] { CHECK_OK(b.group->connect({0})); }});
  together({[&] { CHECK_OK(a.group->connect({7})); }, [&] { CHECK_OK(b.group->connect({7})); },
            [&] {
              CHECK_OK(c.group->connect({0, 1}));
            }});
  expect_connected(a, {1, 7});
  CHECK_OK(a.group->disconnect({1}));
  expect_connected(a, {7});
  expect_connected(b, {0, 7});  // disconnect is local
  auto again = a.group->disconnect({7, 1});
  CHECK(!again && mentions(again.error(), "rank 1 is not connected"));
  expect_connected(a, {7});
  CHECK(!a.group->disconnect({0}));
}

TEST(missing_ranks_are_named_and_nothing_is_left) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store, 300 * kMs), b(1, store, 300 * kMs);
  const std::size_t descriptors = open_descriptors();
  together({[&] {
              Outcome outcome = a.group->connect({1, 2, 5});
              CHECK(!outcome && outcome.error().code == Code::kTimeout);
              CHECK(mentions(outcome.error(), "ranks [2, 5] are missing after 300 ms"));
            },
            [&] {
              Outcome outcome = b.group->connect({0, 2, 5});
              CHECK(!outcome && mentions(outcome.error(), "[2, 5]"));
            }});
  expect_connected(a, {});
  expect_connected(b, {});
  CHECK_EQ(store->size(), 0u);
  CHECK(descriptors_settle_at(descriptors));
  CHECK_EQ(mappings_of("group_test_page"), 0u);
  together({[&] { CHECK_OK(a.group->connect({1})); }, [&] { CHECK_OK(b.group->connect({0})); }});
  expect_connected(a, {1});
}

TEST(a_rank_that_was_not_named_is_not_taken) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store, 300 * kMs), b(1, store, 300 * kMs), c(2, store, 300 * kMs);
  together({[&] {
              Outcome outcome = a.group->connect({1});
              CHECK(!outcome && mentions(outcome.error(), "ranks [1] are missing"));
            },
            [&] { CHECK_OK(b.group->connect({2})); }, [&] { CHECK_OK(c.group->connect({1})); }});
  expect_connected(a, {});
  expect_connected(b, {2});
}

TEST(a_late_rank_and_one_that_tries_again_are_waited_for) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store), b(1, store);
  Rank impatient(2, store, 100 * kMs);
  std::atomic<bool> tried{false};
  together({[&] {
              CHECK_OK(a.group->connect({1, 2}));
            },
            [&] {
              while (!tried) std::this_thread::yield();
              CHECK_OK(b.group->connect({0, 2}));
            },
            [&] {
              CHECK(!impatient.group->connect({0, 1}));
              tried = true;
              while (!impatient.group->connect({0, 1})) {
              }
            }});
  expect_connected(a, {1, 2});
  expect_connected(impatient, {0, 1});
  CHECK_EQ(store->size(), 0u);
}

TEST(a_restarted_rank_connects_without_a_disconnect) {
  auto store = std::make_shared<MemoryStore>();
  for (int restarted : {0, 1}) {  // as the side that dials, and as the side that is dialled
    auto first = std::make_unique<Rank>(restarted, store);
    Rank survivor(1 - restarted, store);
    together({[&] { CHECK_OK(first->group->connect({1 - restarted})); },
              [&] { CHECK_OK(survivor.group->connect({restarted})); }});
    CHECK_EQ(survivor.memory.incarnation_of(restarted), first->incarnation);
    first.reset();
    CHECK(survivor.group->has(restarted));  // gone, and a member until somebody says otherwise
    Rank second(restarted, store);
    together({[&] { CHECK_OK(second.group->connect({1 - restarted})); },
              [&] { CHECK_EQ(CHECK_OK(survivor.group->connect({restarted}))->size(), 1u); }});
    CHECK_EQ(survivor.memory.incarnation_of(restarted), second.incarnation);
    expect_connected(survivor, {restarted});
  }
}

TEST(a_stale_card_is_not_taken_for_the_new_rank) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store);
  {
    Rank killed(1, store);  // its card stays behind
    Card card{1,      killed.incarnation,           ::getpid(),
              "here", *CHECK_OK(net::this_place()), "nixl_ep.gone." + std::to_string(::getpid())};
    CHECK_OK(store->publish(store_key(1), encode(card)));
  }
  Rank again(1, store);
  together({[&] { CHECK_OK(a.group->connect({1})); },
            [&] {
              ::usleep(30'000);  // lets the other side meet the stale card first; either order must do
              CHECK_OK(again.group->connect({0}));
            }});
  CHECK_EQ(a.memory.incarnation_of(1), again.incarnation);
  CHECK_EQ(store->size(), 0u);

  Rank lonely(0, store, 200 * kMs);
  CHECK_OK(store->publish(store_key(1), "not a card"));
  Outcome garbage = lonely.group->connect({1});
  CHECK(!garbage && mentions(garbage.error(), "NIXL_EP/1 cannot be read"));
}

TEST(ranks_that_cannot_share_memory_are_refused_with_the_reason) {
  for (int other : {0, 2}) {
    for (const char* what : {"host", "network namespace"}) {
      auto store = std::make_shared<MemoryStore>();
      Rank a(1, store);
      Card card{other, 1, 77, "far", *CHECK_OK(net::this_place()), "x"};
      (std::string(what) == "host" ? card.place.boot_id : card.place.network_namespace) = "elsewhere";
      CHECK_OK(store->publish(store_key(other), encode(card)));
      Outcome outcome = a.group->connect({other});
      CHECK(!outcome && outcome.error().code == Code::kUnsupported);
      CHECK(mentions(outcome.error(), "rank " + std::to_string(other)));
      CHECK(mentions(outcome.error(), std::string("another ") + what));
      expect_connected(a, {});
    }
  }
}

TEST(other_numbers_of_experts_are_refused_on_both_sides) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store, 20'000 * kMs, 4), b(1, store, 500 * kMs, 8);
  together({[&] {
              Outcome outcome = a.group->connect({1});
              CHECK(!outcome && mentions(outcome.error(), "8 experts per rank"));
            },
            [&] {
              Outcome outcome = b.group->connect({0});
              CHECK(!outcome && mentions(outcome.error(), "experts per rank"));
            }});
  expect_connected(a, {});
  expect_connected(b, {});
}

TEST(a_failure_at_any_step_leaves_nothing) {
  auto store = std::make_shared<FailingStore>();
  std::vector<std::unique_ptr<Rank>> ranks;
  for (int r = 0; r < 4; ++r) ranks.push_back(std::make_unique<Rank>(r, store, 400 * kMs));
  const auto all_try = [&](bool must_fail) {
    std::vector<std::function<void()>> bodies;
    for (auto& rank : ranks)
      bodies.push_back([&, &rank = *rank] { CHECK_EQ(!rank.group->connect({0, 1, 2, 3}), must_fail); });
    together(bodies);
  };
  const std::size_t descriptors = open_descriptors();
  const auto nothing_left = [&] {
    for (auto& rank : ranks) expect_connected(*rank, {});
    CHECK_EQ(store->inner.size(), 0u);
    CHECK(descriptors_settle_at(descriptors));
    CHECK_EQ(mappings_of("group_test_page"), 0u);
  };
  for (int victim = 0; victim < 4; ++victim)
    for (int call = 0; call < 3; ++call) {
      ranks[victim]->memory.calls_until_failure = call;
      all_try(true);
      ranks[victim]->memory.calls_until_failure = -1;
      nothing_left();
    }
  store->fail_publish = true;
  all_try(true);
  store->fail_publish = false;
  nothing_left();
  store->fail_fetch = true;
  all_try(true);
  store->fail_fetch = false;
  nothing_left();
  store->fail_withdraw = true;  // the pairs are made; the store does not matter any more
  all_try(false);
  for (auto& rank : ranks) CHECK_EQ(rank->group->members().size(), 3u);
}

// A peer that ends after a number of steps of the handshake, as a killed process does: without a word.
namespace {

void half_a_handshake(Store& store, int rank, int steps) {
  const Deadline deadline = Deadline::after(10'000 * kMs);
  const Card card = *CHECK_OK(parse_card(*CHECK_OK(store.fetch(store_key(1), deadline))));
  net::Channel link(std::move(*CHECK_OK(net::connect_local(card.socket, deadline))), kMaxMessageBytes);
  PageMemory memory(rank);
  const std::uint32_t incarnation = next_incarnation();
  if (steps-- == 0) return;
  CHECK_OK(link.send(encode(Hello{rank, incarnation, 1, card.incarnation}), deadline));
  CHECK_OK(link.receive(deadline));
  if (steps-- == 0) return;
  const Export exported = std::move(*CHECK_OK(memory.export_memory()));
  const int descriptors[] = {exported.descriptors[0].get()};
  CHECK_OK(link.send(encode(Memory{kExperts, exported.description}), descriptors, deadline));
  CHECK_OK(link.receive(deadline));
  if (steps-- == 0) return;
  CHECK_OK(link.send(encode(Attached{}), deadline));
  CHECK_OK(link.receive(deadline));  // its READY
  if (steps-- == 0) return;
  CHECK_OK(link.send(encode(Ready{}), deadline));
}

}  // namespace

TEST(a_peer_that_dies_in_the_handshake) {
  for (int steps = 0; steps <= 4; ++steps) {
    auto store = std::make_shared<MemoryStore>();
    Rank a(1, store, steps < 2 ? 300 * kMs : 20'000 * kMs);
    together({[&] {
                Outcome outcome = a.group->connect({0});
                if (steps < 2) {  // it never named us for good: a successor is waited for until the deadline
                  CHECK(!outcome && outcome.error().code == Code::kTimeout);
                } else if (steps == 2) {
                  CHECK(!outcome && outcome.error().code == Code::kPeerLost);
                  CHECK(mentions(outcome.error(),
                                 "rank 0 (process " + std::to_string(::getpid()) + ") died while connecting"));
                } else {  // dead, but after the point of no return
                  CHECK(outcome);
                }
              },
              [&] { half_a_handshake(*store, 0, steps); }});
    expect_connected(a, steps < 3 ? std::set<int>{} : std::set<int>{0});
    CHECK_EQ(store->size(), 0u);
    Rank replacement(0, store);
    together({[&] { CHECK_EQ(CHECK_OK(a.group->connect({0}))->size(), 1u); },
              [&] { CHECK_OK(replacement.group->connect({1})); }});
    CHECK_EQ(a.memory.incarnation_of(0), replacement.incarnation);
  }
}

TEST(strangers_do_no_harm) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store), b(1, store);
  const std::string name = "nixl_ep.1." + [&] {
    char hex[16];
    std::snprintf(hex, sizeof(hex), "%08x", b.incarnation);
    return std::string(hex);
  }() + "." + std::to_string(::getpid());
  const Deadline deadline = Deadline::after(10'000 * kMs);
  std::vector<net::Channel> callers;
  for (const std::string& text : {std::string("garbage"), encode(Ready{}), encode(Hello{0, 5, 1, b.incarnation + 1}),
                                  encode(Hello{0, 5, 3, b.incarnation}), encode(Hello{1, 5, 1, b.incarnation})}) {
    callers.emplace_back(std::move(*CHECK_OK(net::connect_local(name, deadline))), kMaxMessageBytes);
    CHECK_OK(callers.back().send(text, deadline));
    auto end = callers.back().receive(deadline);
    CHECK(!end && end.error().code == Code::kPeerLost);
  }
  Fd silent = std::move(*CHECK_OK(net::connect_local(name, deadline)));
  CHECK_EQ(::write(silent.get(), "\xff\xff\xff\xff\xff\xff\xff\xff", 8), 8);
  together({[&] { CHECK_OK(a.group->connect({1})); }, [&] { CHECK_OK(b.group->connect({0})); }});
}

TEST(close_cancels_a_connect) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store);
  std::thread waiting([&] {
    Outcome outcome = a.group->connect({1});
    CHECK(!outcome && outcome.error().code == Code::kCancelled);
  });
  while (store->size() == 0) std::this_thread::yield();
  a.group->close();
  waiting.join();
  CHECK_EQ(store->size(), 0u);
}

TEST(without_a_store_connect_says_so) {
  Rank a(0, nullptr);
  Outcome outcome = a.group->connect({1});
  CHECK(!outcome && outcome.error().code == Code::kNotAllowed && mentions(outcome.error(), "NIXL_ETCD_ENDPOINTS"));
}

TEST(a_second_connect_waits_and_a_disconnect_does_not) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store), b(1, store), c(2, store), d(3, store);
  together({[&] { CHECK_OK(a.group->connect({1})); }, [&] { CHECK_OK(b.group->connect({0})); }});
  std::thread first([&] { CHECK_OK(a.group->connect({2})); });
  while (store->size() == 0) std::this_thread::yield();
  CHECK_OK(a.group->disconnect({1}));  // while the other thread waits for rank 2
  std::thread second([&] { CHECK_OK(a.group->connect({3})); });
  together({[&] { CHECK_OK(c.group->connect({0})); }, [&] { CHECK_OK(d.group->connect({0})); }});
  first.join();
  second.join();
  expect_connected(a, {2, 3});
}

TEST(a_thousand_rounds_leak_nothing) {
  auto store = std::make_shared<MemoryStore>();
  Rank a(0, store), b(1, store);
  std::size_t descriptors = 0;
  for (int round = 0; round < 1000; ++round) {
    together({[&] { CHECK_OK(a.group->connect({1})); }, [&] { CHECK_OK(b.group->connect({0})); }});
    together({[&] { CHECK_OK(a.group->disconnect({1})); }, [&] { CHECK_OK(b.group->disconnect({0})); }});
    if (round == 0) descriptors = open_descriptors();
  }
  CHECK(descriptors_settle_at(descriptors));
  CHECK_EQ(mappings_of("group_test_page"), 0u);
  CHECK_EQ(store->size(), 0u);
}

TEST(damaged_cards_and_messages_are_refused_or_read_and_no_more) {
  Card card;
  card.rank = 3;
  card.host = "host";
  card.socket = "socket";
  card.place = *CHECK_OK(net::this_place());
  check::fuzz(encode(card), [](const std::string& bytes) { (void)parse_card(bytes); });
  for (const LinkMessage& message : {LinkMessage(Hello{1, 2, 3, 4}), LinkMessage(Memory{2, "description"}),
                                     LinkMessage(Attached{}), LinkMessage(Ready{}), LinkMessage(Abort{"reason"})})
    check::fuzz(encode(message), [](const std::string& bytes) { (void)parse_message(bytes); });
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
