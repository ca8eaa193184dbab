// A peer that writes nonsense into its own memory: others mask it or take what it says, but are never led astray.
#include "base/fd.h"
#include "base/log.h"
#include "device/host/shared_memory.h"
#include "ep/cpu/memory.h"
#include "ep/cpu/test_ranks.h"
#include "fuzz.h"

namespace nixl::core::ep::test {
namespace {

constexpr Nanoseconds kTimeout = 5'000'000;

// The memories of a rank, as whoever else maps them sees them.
struct Memories {
  explicit Memories(const TestRank& rank) {
    Export all = std::move(*CHECK_OK(rank.path->export_memory()));
    control_memory = *CHECK_OK(SharedMemory::import(std::move(all.descriptors[0])));
    data = *CHECK_OK(SharedMemory::import(std::move(all.descriptors[1])));
    control = Control(control_memory.data());
  }
  SharedMemory control_memory, data;
  Control control;
};

// Staged bytes that were written over; put back before their owner reads them itself.
using Overwritten = std::vector<std::pair<std::byte*, std::uint64_t>>;

void scribble(check::Fuzz& fuzz, const Memories& memory, int reader, Overwritten& overwritten) {
  Header& header = memory.control.header(reader, Channel::kOperations, static_cast<std::uint32_t>(fuzz.random() % 2));
  Message& m = header.message;
  const std::uint64_t value = fuzz.number();
  const auto narrow = static_cast<std::int32_t>(value);
  const auto wide = static_cast<std::int64_t>(value);
  switch (fuzz.random() % 15) {
    case 0:
      m.stage_offset = fuzz.one_in(2) ? wide : m.stage_offset + narrow % 4096;
      break;
    case 1:
      m.num_entries = wide;
      break;
    case 2:
      m.num_tokens = wide;
      break;
    case 3:
      m.hidden = wide;
      break;
    case 4:
      m.max_tokens = wide;
      break;
    case 5:
      m.row_stride = wide;
      break;
    case 6:
      m.staged = static_cast<Staged>(fuzz.one_in(2) ? value % 5 : value);
      break;
    case 7:
      m.slot = fuzz.one_in(2) ? static_cast<std::uint32_t>(value % 4) : static_cast<std::uint32_t>(value);
      break;
    case 8:
      m.num_ranks = narrow;
      break;
    case 9:
      m.experts_per_rank = narrow;
      break;
    case 10:
      m.payload = narrow;
      break;
    case 11:
      (fuzz.one_in(2) ? m.with_weights : m.rows_in_place) ^= 1;
      break;
    case 12:
      m.generation = value;
      break;
    case 13:
      (fuzz.one_in(2) ? memory.control.hello().held_until : memory.control.hello().released_at) = wide;
      break;
    default: {  // what is staged: where blocks begin, entries, rows
      const std::int64_t at = m.stage_offset + static_cast<std::int64_t>(fuzz.random() % 512) * 4;
      if (at < 0 || at + 8 > memory.data.size()) return;
      std::uint64_t old = 0;
      std::memcpy(&old, memory.data.data() + at, sizeof old);
      overwritten.emplace_back(memory.data.data() + at, old);
      std::memcpy(memory.data.data() + at, &value, fuzz.one_in(2) ? 4 : 8);
    }
  }
}

void rounds_with_a_scribbler(Combine mode, bool with_weights) {
  const Shape shape{2, 2, 6, 128, 2};
  set_log_level(LogLevel::kFatal);  // a line for each mask
  auto group = make_group(shape, kTimeout, mode);
  TestRank& reader = *group[0];
  TestRank& peer = *group[1];
  const Memories memory(peer);
  check::Fuzz fuzz(700);
  int heard = 0, masked = 0;
  for (std::uint32_t round = 0; fuzz.more(); ++round) {
    Overwritten overwritten;
    const auto scribbles = [&] {
      for (auto times = 1 + fuzz.random() % 3; times; --times) scribble(fuzz, memory, 0, overwritten);
    };
    const auto put_back = [&] {
      for (; !overwritten.empty(); overwritten.pop_back())
        std::memcpy(overwritten.back().first, &overwritten.back().second, sizeof(std::uint64_t));
    };
    const Dispatch theirs = peer.dispatch_args(round, Payload::kBf16, with_weights);
    CHECK_OK(peer.path->dispatch_send(theirs));
    scribbles();
    CHECK_OK(reader.path->dispatch(reader.dispatch_args(round, Payload::kBf16, with_weights)));
    put_back();
    CHECK_OK(peer.path->dispatch_recv(theirs));
    for (int local = 0; local < shape.experts_per_rank; ++local)
      CHECK(reader.out.count[static_cast<std::size_t>(local)] >= 0 &&
            reader.out.count[static_cast<std::size_t>(local)] <= shape.rows());
    (reader.masks()[1] ? masked : heard)++;
    const CombineArgs answers = peer.combine_args(with_weights);
    CHECK_OK(peer.path->combine_send(answers));
    scribbles();
    // A count that the peer made up may not have been one that it sent rows for; a caller passes on what dispatch gave it.
    CHECK_OK(reader.path->combine(reader.combine_args(with_weights)));
    put_back();
    CHECK_OK(peer.path->combine_recv(answers));
    memory.control.hello().held_until = memory.control.hello().released_at = 0;
    for (TestRank* rank : {&reader, &peer}) {
      (void)rank->path->take_faults();
      (void)rank->path->take_input_error();
      rank->unmask({1 - rank->rank});
    }
  }
  CHECK(heard > 100 && masked > 100);
}

}  // namespace

TEST(exact_sums) {
  rounds_with_a_scribbler(Combine::kExact, false);
}
TEST(exact_sums_with_weights) {
  rounds_with_a_scribbler(Combine::kExact, true);
}
TEST(reduced_sums_with_weights) {
  rounds_with_a_scribbler(Combine::kReduced, true);
}
TEST(reduced_sums_with_asked_weights) {
  rounds_with_a_scribbler(Combine::kReduced, false);
}

}  // namespace nixl::core::ep::test

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
