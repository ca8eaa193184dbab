// Lanes that a sender tramples: messages may be lost, and the reader goes on.
#include "backends/samehost/lane.h"

#include "check.h"
#include "fuzz.h"

using namespace nixl::core;
using namespace nixl::core::samehost;

namespace {

// Writes nonsense where a sender may write: the ring, its bytes' headers, the counts.
void trample(check::Fuzz& fuzz, Segment& segment, std::uint32_t index) {
  LaneHeader& lane = segment.lane(index);
  const std::uint64_t value = fuzz.number();
  switch (fuzz.random() % 5) {
    case 0:
      lane.tail = fuzz.one_in(2) ? value : lane.tail + value % 64;
      break;
    case 1:
      lane.head = fuzz.one_in(2) ? value : lane.head + value % 64;
      break;
    case 2:
      lane.owner = value;
      break;
    default: {
      const std::uint64_t at = (lane.head + fuzz.random() % 64) % (kLaneBytes - 8);
      std::memcpy(segment.lane_data(index) + at, &value, 8);
    }
  }
  segment.header().dirty[index / 64] |= std::uint64_t{1} << index % 64;
}

}  // namespace

TEST(a_trampled_lane_harms_no_other) {
  Segment segment = std::move(*CHECK_OK(Segment::create(1)));
  LaneReader reader(segment, "reader");
  LaneWriter good = std::move(*CHECK_OK(LaneWriter::claim(segment, "good")));  // lane 0
  std::uint64_t sent = 0, heard = 0;
  for (check::Fuzz fuzz; fuzz.more();) {
    auto bad = LaneWriter::claim(segment, "bad");
    CHECK_OK(bad);
    for (int i = 0; i < 3; ++i) bad->send(std::string(fuzz.random() % 300, 'b'));
    if (fuzz.one_in(50)) bad->send(std::string(3 * kLaneBytes, 'B'));
    trample(fuzz, segment, 1);
    good.send("good " + std::to_string(sent++));
    std::vector<Notification> out;
    for (int i = 0; i < 3; ++i) {
      reader.collect(out);
      (void)bad->push();
    }
    for (const Notification& one : out)
      if (one.sender == "good") CHECK_EQ(one.message, "good " + std::to_string(heard++));
    // The next sender finds a lane as it must be.
    LaneHeader& lane = segment.lane(1);
    lane.owner = 0;
    lane.tail = lane.head = 0;
  }
  CHECK_EQ(heard, sent);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
