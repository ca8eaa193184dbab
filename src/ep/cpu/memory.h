// What ranks share on the CPU path: control memory, a page of words each, and data memory, where senders stage what
// receivers pull. docs/ep_layout.md describes both.
//
// A rank writes to its own two memories, and in a peer's control memory to its own flag words and the doorbell. So
// whatever a stopped or masked rank still writes when it wakes can only concern itself.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "device/host/futex.h"
#include "device/host/shared_memory.h"
#include "ep/layout/layout.h"
#include "ep/layout/wire.h"
#include "ep/path.h"

namespace nixl::core::ep {

template <typename T>
T* at(std::byte* base, std::int64_t offset) {
  return reinterpret_cast<T*>(base + offset);
}
template <typename T>
const T* at(const std::byte* base, std::int64_t offset) {
  return reinterpret_cast<const T*>(base + offset);
}

inline constexpr std::uint64_t kControlMagic = 0x314c5254434c584eULL;  // "NXLCTRL1"

// Operations and barriers of a pair are counted apart: a barrier may come between the phases of an operation.
enum class Channel : int { kOperations = 0, kBarriers = 1 };
inline constexpr int kChannels = 2;

// Slots of data memory to stage in. In step a rank needs two; one more or two while a peer that was masked or detached
// after an operation still reads what that operation sent it.
inline constexpr int kSlots = 4;

// What is staged in a slot.
enum class Staged : std::uint32_t {
  kNothing = 0,   // a barrier
  kTokens = 1,    // dispatch: rows and where they go
  kRows = 2,      // exact combine: a block of rows for each (owner, local expert)
  kWeights = 3,   // reduced combine, first half: weights of the owner's tokens
  kPartials = 4,  // reduced combine, second half: a block of summed rows for each owner
};

// First page of control memory. Written by its rank, except the doorbell.
struct Hello {
  std::uint64_t magic = 0;
  std::uint32_t rank = 0;
  std::uint32_t incarnation = 0;
  alignas(64) Doorbell doorbell;
  // Until when the wait under way may last (CLOCK_MONOTONIC; 0: not waiting), and when the last wait that ended with a
  // masked peer ended. Others look here before they give this rank up.
  alignas(64) std::atomic<std::int64_t> held_until{0};
  std::atomic<std::int64_t> released_at{0};
  // Odd while a slot is being overwritten; what a header promises holds as long as the number in it is this one.
  alignas(64) std::atomic<std::uint64_t> generation[kSlots]{};
};
static_assert(sizeof(Hello) <= ControlLayout::kHelloBytes);

// Words of one source in the receiver's control memory, written by that source.
struct Inbox {
  std::atomic<FlagWord> flags[kChannels][2]{};
  std::atomic<FlagWord> taken{0};  // the newest message of the receiver that the source has read to its end
  std::atomic<FlagWord>& flag(Channel channel, std::uint32_t count) {
    return flags[static_cast<int>(channel)][flag_slot(count)];
  }
};
static_assert(sizeof(Inbox) <= ControlLayout::kInboxBytes);

// What a message consists of: enough to compute its stage's offsets again.
struct Message {
  std::uint64_t generation = 0;
  std::int64_t stage_offset = 0;  // of the slot in data memory
  std::int64_t num_entries = 0;
  std::int64_t num_tokens = 0;
  std::int64_t hidden = 0;
  std::int64_t max_tokens = 0;
  std::int64_t row_stride = 0;  // combine: bytes from row to row
  Staged staged = Staged::kNothing;
  std::uint32_t slot = 0;
  std::int32_t num_ranks = 0;
  std::int32_t experts_per_rank = 0;
  std::int32_t payload = 0;
  std::int32_t with_weights = 0;
  std::int32_t rows_in_place = 0;  // combine: rows lie where the caller put them, not in the stage
};

// A message for one destination, in the sender's control memory; the flag in the destination's memory announces it.
// `count` is the flag's, 0 while the message is being written; `awaits` the destination's count in the same operation.
// `revoked` takes it back: set when the sender masks the destination.
struct Header {
  std::atomic<std::uint32_t> count{0};
  std::atomic<std::uint32_t> awaits{0};
  std::atomic<std::uint32_t> revoked{0};
  Message message;
};
static_assert(sizeof(Header) <= ControlLayout::kHeaderBytes);

// Between reading shared data and the check that it was not overwritten meanwhile.
inline void reads_done() noexcept {
#if defined(__SANITIZE_THREAD__)  // knows no fences; on x86 loads stay in order by themselves
  asm volatile("" ::: "memory");
#else
  std::atomic_thread_fence(std::memory_order_acquire);
#endif
}

// Typed view of a control memory.
class Control {
 public:
  Control() = default;
  explicit Control(std::byte* base) : base_(base) {}
  Hello& hello() const { return *reinterpret_cast<Hello*>(base_); }
  Inbox& inbox(int source) const { return *reinterpret_cast<Inbox*>(base_ + kLayout.inbox_of(source)); }
  Header& header(int destination, Channel channel, std::uint32_t count) const {
    return *reinterpret_cast<Header*>(base_ +
                                      kLayout.header_of(destination, static_cast<int>(channel), flag_slot(count)));
  }

 private:
  static constexpr ControlLayout kLayout = make_control_layout();
  std::byte* base_ = nullptr;
};

// This rank's memories.
class OwnMemory {
 public:
  Result<void> open(int rank, std::uint32_t incarnation);
  // Room for calls that `capacity` allows. May move data(); what peers are reading stays where it is.
  Result<void> reserve(const Capacity& capacity);
  Result<Export> export_memory() const;

  const Control& control() const { return control_; }
  std::int64_t slot_bytes() const { return slot_bytes_; }
  std::int64_t slot_offset(int slot) const { return first_slot_ + slot * slot_bytes_; }
  std::byte* slot(int slot) const { return data_.data() + slot_offset(slot); }
  // Memory for clients to overwrite: nothing that is in flight lies there.
  View exposed() const;

  // Brackets of overwriting a slot; `end_stage` gives the generation to announce.
  void begin_stage(int slot) const;
  std::uint64_t end_stage(int slot) const;

 private:
  SharedMemory control_memory_;
  SharedMemory data_;
  std::vector<SharedMemory> retired_;  // earlier mappings: views handed out stay valid
  SharedMemory exposed_;
  std::int64_t exposed_bytes_ = 0;
  Control control_;
  std::int64_t first_slot_ = 0;
  std::int64_t slot_bytes_ = 0;
};

// A peer's memories, mapped here.
class ImportedMemory {
 public:
  static Result<ImportedMemory> open(const PeerIdentity& peer, Export memory);
  const Control& control() const { return control_; }
  // The staged bytes [offset, offset + bytes) of the peer; null when its memory is shorter than that.
  const std::byte* staged(std::int64_t offset, std::int64_t bytes);

 private:
  SharedMemory control_memory_;
  SharedMemory data_;
  Control control_;
};

}  // namespace nixl::core::ep
