// The shared segment that every agent of this backend offers to its peers: who it is, which of its regions are alive,
// and the lanes that carry messages to it. Format: docs/samehost.md. A sealed memory file, so a peer's mapping can
// never fault.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::samehost {

inline constexpr std::uint64_t kSegmentMagic = 0x31474553'4c58494eull;  // "NIXLSEG1"
inline constexpr std::uint32_t kNumLanes = 512;
inline constexpr std::uint32_t kLaneBytes = 64 << 10;
inline constexpr std::uint32_t kNumSlots = 1 << 20;
inline constexpr std::size_t kMaxCallersEvents = 4;

struct alignas(64) SegmentHeader {
  std::uint64_t magic;
  std::uint64_t incarnation;
  std::uint32_t pid;
  std::uint32_t num_lanes, lane_bytes, num_slots;
  // 1: the owner sleeps and wants its doorbell rung after something was put into a lane.
  alignas(64) std::atomic<std::uint32_t> armed;
  // 1: the owner has closed; the end of its process is no failure.
  std::atomic<std::uint32_t> closed;
  // 1: the owner's callers may sleep on their event descriptors and want them written to; see CallersEvents.
  std::atomic<std::uint32_t> callers_armed;
  // Those descriptors: number in the owner << 32 | the kernel's eventfd-id + 1; 0 = none, from there on.
  std::atomic<std::uint64_t> callers_events[kMaxCallersEvents];
  // Bit l of word l / 64: lane l has something new.
  alignas(64) std::atomic<std::uint64_t> dirty[kNumLanes / 64];
};

// One sender's way in: a ring with one writer and one reader. `tail` and `head` count bytes since the lane was made.
// owner: 0 free, else pid << 32 | tag << 1 | leaving.
struct LaneHeader {
  alignas(64) std::atomic<std::uint64_t> owner;
  alignas(64) std::atomic<std::uint64_t> tail;  // written by the sender
  alignas(64) std::atomic<std::uint64_t> head;  // written by the receiver
};

struct FrameHeader {
  std::uint32_t bytes;  // of payload; the next frame starts at the next multiple of 8
  std::uint32_t kind;
};
enum FrameKind : std::uint32_t { kHello = 1, kPart = 2, kLast = 3, kOffer = 4 };

static_assert(std::atomic<std::uint64_t>::is_always_lock_free && sizeof(std::atomic<std::uint64_t>) == 8);
static_assert(sizeof(LaneHeader) == 192 && sizeof(SegmentHeader) == 192 && sizeof(FrameHeader) == 8);
static_assert(offsetof(SegmentHeader, callers_events) == 80 && offsetof(SegmentHeader, dirty) == 128);

// A mapping of a segment, our own or a peer's. Move-only; unmaps on destruction.
class Segment {
 public:
  static Result<Segment> create(std::uint64_t incarnation);
  // `file`: the peer's segment. Checks size, seals, magic, incarnation and pid; kMismatch says what was seen.
  static Result<Segment> map(Fd file, std::uint64_t incarnation, std::uint32_t pid);

  Segment() = default;
  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&& other) noexcept;
  ~Segment();

  SegmentHeader& header() const noexcept { return *reinterpret_cast<SegmentHeader*>(base_); }
  std::atomic<std::uint64_t>& slot(std::uint32_t index) const noexcept {
    return reinterpret_cast<std::atomic<std::uint64_t>*>(base_ + kSlotsAt)[index];
  }
  LaneHeader& lane(std::uint32_t index) const noexcept {
    return *reinterpret_cast<LaneHeader*>(base_ + kLanesAt + index * kLaneStride);
  }
  char* lane_data(std::uint32_t index) const noexcept {
    return base_ + kLanesAt + index * kLaneStride + sizeof(LaneHeader);
  }
  int fd() const noexcept { return file_.get(); }

 private:
  static constexpr std::size_t kSlotsAt = 4096;
  static constexpr std::size_t kLanesAt = kSlotsAt + std::size_t{kNumSlots} * 8;
  static constexpr std::size_t kLaneStride = sizeof(LaneHeader) + kLaneBytes;
  static constexpr std::size_t kBytes = kLanesAt + kNumLanes * kLaneStride;

  Fd file_;
  char* base_ = nullptr;
};

}  // namespace nixl::core::samehost
