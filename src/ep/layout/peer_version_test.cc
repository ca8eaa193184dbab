// The decisions of ep/layout/peer_version.h, driven by a model of ranks whose operations interleave in any order: ranks
// that sit operations out, give each other up, are masked by their callers, and come together again at one boundary.
// What the kernels of the CUDA path do with these words, the model does with plain memory.
#include "ep/layout/peer_version.h"

#include <algorithm>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"

namespace {

using namespace nixl::core::ep;

constexpr int kRanks = 4;

struct Rank {
  std::uint32_t incarnation = 0;
  std::uint64_t begun = 0;  // operations
  PeerVersion versions[kRanks][2];
  PushHeader inbox[kRanks][2];
  // The operation under way.
  bool busy = false;
  std::vector<int> to_send, to_hear, failed;
  std::uint32_t parity[kRanks];  // of the others' operations, as far as it is known before they are heard
};

class Model {
 public:
  explicit Model(unsigned seed) : random_(seed) {
    for (int r = 0; r < kRanks; ++r) {
      ranks_[r].incarnation = 100 + r;
      ranks_[r].begun = below(3);  // joined after any number of operations
    }
    for (int a = 0; a < kRanks; ++a)
      for (int b = 0; b < a; ++b) connect(a, b);
  }
  std::uint32_t below(std::uint32_t n) { return random_() % n; }

  // Both sides idle towards each other.
  void connect(int a, int b) {
    const std::uint32_t first_a = first_count(ranks_[a].begun), first_b = first_count(ranks_[b].begun);
    for (auto [own, other, sends, hears] : {std::tuple{a, b, first_a, first_b}, std::tuple{b, a, first_b, first_a}}) {
      Rank& rank = ranks_[own];
      write(own, other, connected(rank.begun, ranks_[other].incarnation, sends, hears));
      rank.inbox[other][flag_slot(hears)] = PushHeader{};
      rank.inbox[other][flag_slot(hears - 1)] = header_before(ranks_[other].incarnation, hears);
    }
  }
  void disconnect(int a, int b) {
    for (auto [own, other] : {std::pair{a, b}, std::pair{b, a}}) {
      PeerVersion now = latest(own, other);
      now.status = PeerStatus::kAbsent;
      write(own, other, now);
    }
  }
  void mask(int own, int other) {
    PeerVersion now = latest(own, other);
    if (now.status == PeerStatus::kActive) now.status = PeerStatus::kMasked;
    write(own, other, now);
  }
  void unmask(int own, int other) {
    const PeerVersion now = latest(own, other);
    if (now.status == PeerStatus::kAbsent || (now.status == PeerStatus::kActive && ranks_[own].busy)) return;
    write(own, other, unmasked(now, ranks_[own].inbox[other][0], ranks_[own].inbox[other][1]));
  }

  void begin(int own) {
    Rank& rank = ranks_[own];
    CHECK(!rank.busy);
    rank.busy = true;
    ++rank.begun;
    for (int other = 0; other < kRanks; ++other)
      if (other != own && running(own, other).status == PeerStatus::kActive) {
        rank.to_send.push_back(other);
        rank.to_hear.push_back(other);
        rank.parity[other] = before(own, other).parity();
      }
  }
  // One thing that the operation under way can do now; false: nothing, or it has ended.
  bool step(int own) {
    Rank& rank = ranks_[own];
    if (!rank.busy) return false;
    if (!rank.to_send.empty()) {
      send(own, take(rank.to_send));
      return true;
    }
    for (std::size_t i = 0; i < rank.to_hear.size(); ++i) {
      const int other = rank.to_hear[i];
      const PushHeader& header = rank.inbox[other][flag_slot(expected_in(running(own, other), rank.begun - 1))];
      const bool here = names_operation(header, running(own, other), rank.begun - 1);
      const bool past =
          is_past(header, running(own, other), rank.begun - 1) || (!here && before(own, other).withdrawn());
      if (!past && !here) continue;
      rank.to_hear.erase(rank.to_hear.begin() + static_cast<std::ptrdiff_t>(i));
      if (past) {
        rank.failed.push_back(other);
        return true;
      }
      in_step_ = in_step_ && header.awaits == sent_in(running(own, other), rank.begun - 1);
      if (rank.parity[other] != kUnknownParity) {
        ++parities_known_;
        parities_right_ += rank.parity[other] == header.word >> 31;
      }
      return true;
    }
    if (!rank.to_hear.empty()) return false;
    end(own);
    return true;
  }
  // Gives up one of those that have not been heard.
  void time_out(int own) {
    Rank& rank = ranks_[own];
    if (rank.busy && !rank.to_hear.empty()) rank.failed.push_back(take(rank.to_hear));
  }
  bool busy(int own) const { return ranks_[own].busy; }
  bool sent_all(int own) const { return ranks_[own].to_send.empty(); }
  bool in_step() const { return in_step_; }
  void forget_trouble() { in_step_ = true; }
  std::uint64_t faults() const { return faults_; }
  bool repeated() const { return repeated_; }
  std::uint64_t parities_known() const { return parities_known_; }
  bool parities_right() const { return parities_right_ == parities_known_; }

  void let_all_end(bool with_timeouts) {
    for (;;) {
      bool moved = false, busy_ones = false;
      for (int turn = 0; turn < 4 * kRanks; ++turn) moved = step(static_cast<int>(below(kRanks))) || moved;
      for (int r = 0; r < kRanks; ++r) {
        moved = step(r) || moved;
        busy_ones = busy_ones || ranks_[r].busy;
      }
      if (!busy_ones) return;
      if (moved) continue;
      CHECK(with_timeouts);  // else ranks wait for each other that will never hear each other
      time_out(static_cast<int>(below(kRanks)));
    }
  }

 private:
  int take(std::vector<int>& list) {
    const std::size_t at = below(static_cast<std::uint32_t>(list.size()));
    const int value = list[at];
    list.erase(list.begin() + static_cast<std::ptrdiff_t>(at));
    return value;
  }
  PeerVersion running(int own, int other) const {
    return version_for(ranks_[own].versions[other][0], ranks_[own].versions[other][1], ranks_[own].begun - 1);
  }
  PeerVersion latest(int own, int other) const {
    return advanced(version_for(ranks_[own].versions[other][0], ranks_[own].versions[other][1], ~0ull - 1),
                    ranks_[own].begun);
  }
  HeaderBefore before(int own, int other) const {
    const PeerVersion now = running(own, other);
    const std::uint64_t number = ranks_[own].begun - 1;
    const std::uint32_t expected = expected_in(now, number);
    return {ranks_[own].inbox[other][flag_slot(expected - 1)], now.incarnation, expected, number == now.from};
  }
  void write(int own, int other, const PeerVersion& version) {
    auto& versions = ranks_[own].versions[other];
    versions[place_for(versions[0].from, versions[1].from, version.from)] = version;
  }
  void send(int own, int other) {
    const PeerVersion to = running(own, other);
    const std::uint64_t number = ranks_[own].begun - 1;
    const std::uint32_t count = sent_in(to, number);
    ranks_[other].inbox[own][flag_slot(count)] = {ranks_[own].incarnation, count, expected_in(to, number),
                                                  number % 2 ? kHeaderParity : 0};
    repeated_ = !used_.insert({own, other, ranks_[own].incarnation, count}).second || repeated_;
  }
  void end(int own) {
    Rank& rank = ranks_[own];
    for (int other : rank.failed) {
      const PeerVersion newest = version_for(rank.versions[other][0], rank.versions[other][1], ~0ull - 1);
      const Failure failure = failed_in(rank.begun - 1, running(own, other), newest, rank.incarnation);
      if (failure.told) {
        write(own, other, failure.version);
        ++faults_;
      }
      if (failure.withdrawn) ranks_[other].inbox[own][flag_slot(failure.header.count)] = failure.header;
    }
    rank.failed.clear();
    rank.busy = false;
  }

  std::mt19937 random_;
  Rank ranks_[kRanks];
  bool in_step_ = true, repeated_ = false;
  std::uint64_t faults_ = 0, parities_known_ = 0, parities_right_ = 0;
  std::set<std::tuple<int, int, std::uint32_t, std::uint32_t>> used_;
};

std::vector<int> in_any_order(Model& model) {
  std::vector<int> list;
  for (int r = 0; r < kRanks; ++r) list.insert(list.begin() + model.below(r + 1), r);
  return list;
}

// Everybody unmasks everybody; who is done may begin the next operation before the others have.
void come_together(Model& model) {
  const bool at_once = model.below(2);
  for (int own : in_any_order(model)) {
    for (int other : in_any_order(model))
      if (other != own) model.unmask(own, other);
    if (at_once) {
      model.begin(own);
      for (std::uint32_t i = model.below(6); i > 0; --i) model.step(own);
    }
  }
  if (at_once) model.let_all_end(false);
}

void operations_in_step(Model& model, int count) {
  model.forget_trouble();
  const std::uint64_t before = model.faults();
  for (int i = 0; i < count; ++i) {
    for (int own : in_any_order(model)) {
      model.begin(own);
      for (std::uint32_t n = model.below(4); n > 0; --n) model.step(static_cast<int>(model.below(kRanks)));
    }
    model.let_all_end(false);
  }
  CHECK(model.in_step());
  CHECK_EQ(model.faults(), before);
}

void trouble(Model& model) {
  for (std::uint32_t steps = 20 + model.below(120); steps > 0; --steps) {
    const int own = static_cast<int>(model.below(kRanks)), other = static_cast<int>(model.below(kRanks));
    switch (model.below(16)) {
      case 0:
        model.time_out(own);
        break;
      case 1:
        if (own != other) model.mask(own, other);
        break;
      case 2:
      case 3:
        if (!model.busy(own)) model.begin(own);
        break;
      default:
        model.step(own);
    }
  }
  model.let_all_end(true);
}

TEST(ranks_are_in_step_again_whatever_they_did_apart) {
  std::uint64_t faults = 0, parities = 0;
  for (unsigned seed = 0; seed < 3000; ++seed) {
    Model model(seed);
    come_together(model);
    operations_in_step(model, 2);
    for (int turn = 0; turn < 4; ++turn) {
      trouble(model);
      come_together(model);
      operations_in_step(model, 3);
    }
    faults += model.faults();
    parities += model.parities_known();
    CHECK(model.parities_right());
  }
  CHECK(faults > 10'000);  // there was trouble
  CHECK(parities > 100'000);
}

// One rank gives another up that had heard it and gone on. In its next operation that one finds the message taken back and waits
// no longer than for what it finds; nobody's time has to run out.
TEST(who_was_given_up_afterwards_learns_it_in_the_next_operation) {
  int given_up = 0;
  for (unsigned seed = 0; seed < 300; ++seed) {
    Model model(seed);
    come_together(model);
    operations_in_step(model, static_cast<int>(model.below(3)));
    for (int own = 0; own < kRanks; ++own) model.begin(own);
    while (model.busy(1) || model.busy(2) || model.busy(3)) {  // rank 0 has sent, and hears nobody
      if (!model.sent_all(0)) model.step(0);
      for (int own = 1; own < kRanks; ++own) model.step(own);
    }
    const std::uint64_t before = model.faults();
    for (int other = 1; other < kRanks; ++other) model.time_out(0);
    model.step(0);
    given_up += static_cast<int>(model.faults() - before);
    for (int own = 0; own < kRanks; ++own) model.begin(own);
    model.let_all_end(false);
    CHECK_EQ(model.faults(), before + 6);  // those three, and as many who found it out
  }
  CHECK_EQ(given_up, 3 * 300);
}

// A rank that misses a barrier: the others give it up and take their messages back; all unmask; the next one is in
// step.
TEST(a_missed_operation_leaves_no_trace) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    Model model(seed);
    come_together(model);
    operations_in_step(model, static_cast<int>(model.below(3)));
    for (int own = 1; own < kRanks; ++own) model.begin(own);
    model.let_all_end(true);
    come_together(model);
    operations_in_step(model, 3);
  }
}

// The same two processes part and meet again: no count, and so no tag, is used twice.
TEST(no_count_returns_when_ranks_reconnect) {
  for (unsigned seed = 0; seed < 500; ++seed) {
    Model model(seed);
    come_together(model);
    for (int turn = 0; turn < 12; ++turn) {
      operations_in_step(model, static_cast<int>(model.below(3)));
      const int a = static_cast<int>(model.below(kRanks)),
                b = static_cast<int>((a + 1 + model.below(kRanks - 1)) % kRanks);
      model.disconnect(a, b);
      for (std::uint32_t apart = model.below(3); apart > 0; --apart) {
        for (int own : in_any_order(model)) model.begin(own);
        model.let_all_end(false);
      }
      model.connect(a, b);
      come_together(model);
    }
    CHECK(!model.repeated());
  }
}

TEST(cells_carry_a_version_whole_and_a_mixture_of_epochs_shows) {
  PeerVersion version;
  version.from = 0x123456789abcdef0;
  version.data = reinterpret_cast<std::uint8_t*>(0x7f0011223344);
  version.control = reinterpret_cast<std::uint8_t*>(0x7f5566778899);
  version.status = PeerStatus::kMasked;
  version.incarnation = 0xdeadbeef;
  version.sent = 0xfffffffe;
  version.expected = 17;
  const PeerCells cells = cells_of(version, 200);
  const PeerVersion read = version_of(cells);
  CHECK(read.from == version.from && read.data == version.data && read.control == version.control);
  CHECK(read.status == version.status && read.incarnation == version.incarnation);
  CHECK(read.sent == version.sent && read.expected == version.expected);
  CHECK(cells.of(200) && !cells.of(201));
  for (int i = 0; i < 4; ++i) {
    PeerCells mixture = cells;
    mixture.cells[i] = cells_of(PeerVersion{}, 201).cells[i];
    CHECK(!mixture.of(200) && !mixture.of(201));
  }
}

TEST(a_caller_who_masks_in_the_middle_is_no_fault_of_the_peer) {
  PeerVersion then;
  then.from = 3;
  then.status = PeerStatus::kActive;
  then.incarnation = 7;
  then.sent = 10;
  then.expected = 20;
  PeerVersion latest = advanced(then, 6);
  latest.status = PeerStatus::kMasked;
  const Failure masked = failed_in(5, then, latest, 9);
  CHECK(!masked.told && masked.withdrawn);
  CHECK(masked.header.incarnation == 9 && masked.header.count == 12 && masked.header.awaits == 22);
  latest.status = PeerStatus::kAbsent;  // its memory may be gone
  const Failure gone = failed_in(5, then, latest, 9);
  CHECK(!gone.told && !gone.withdrawn);
}

TEST(a_header_that_was_taken_back_tells_no_parity) {
  const PushHeader header{7, 12, 4, kHeaderParity | 3};
  CHECK_EQ((HeaderBefore{header, 7, 13, false}.parity()), 0u);
  CHECK_EQ((HeaderBefore{{7, 12, 4, 3}, 7, 13, false}.parity()), 1u);
  CHECK_EQ((HeaderBefore{header, 7, 13, true}.parity()), kUnknownParity);   // unmasked since
  CHECK_EQ((HeaderBefore{header, 7, 14, false}.parity()), kUnknownParity);  // of an older operation
  CHECK_EQ((HeaderBefore{header, 8, 13, false}.parity()), kUnknownParity);
  CHECK_EQ((HeaderBefore{{7, 12, 4, kHeaderWithdrawn}, 7, 13, false}.parity()), kUnknownParity);
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
