// Where things lie in the memory that ranks share. Each layout is a plain struct of offsets made by one constexpr walk;
// whoever writes and whoever reads calls the same function with the same numbers. docs/ep_layout.md draws them.
//
// Control words and data are apart. What clients may overwrite is a third memory, in which nothing is in flight.
#pragma once
#include <cstdint>

#include "ep/layout/shape.h"

namespace nixl::core::ep {

// The payloads of dispatch, by the numbers of nixl::ep::Payload.
inline constexpr int kPayloadBf16 = 0;
inline constexpr int kPayloadFp8 = 1;
inline constexpr int kPayloadFp8Pow2 = 2;
inline constexpr int kPayloadFp8Ue8m0 = 3;

NIXL_HD constexpr std::int64_t row_bytes(int payload, std::int64_t hidden) {
  return payload == kPayloadBf16 ? 2 * hidden : hidden;
}
// 32-bit words of scales that belong to a row: one fp32 a group, or four exponent bytes to a word.
NIXL_HD constexpr std::int64_t scale_words(int payload, std::int64_t hidden) {
  return payload == kPayloadBf16 ? 0 : payload == kPayloadFp8Ue8m0 ? hidden / (4 * kGroup) : hidden / kGroup;
}
// Hidden sizes come in multiples of this.
NIXL_HD constexpr std::int64_t hidden_step(int payload) {
  return payload == kPayloadBf16 ? 8 : payload == kPayloadFp8Ue8m0 ? 4 * kGroup : kGroup;
}

// One rank's control memory, the same size whatever the capacity, so that a group can grow. Pages that nobody touches
// cost nothing.
struct ControlLayout {
  std::int64_t hello = 0;   // who this is; the doorbell others ring; until when this rank may be waiting
  std::int64_t inbox = 0;   // [kMaxRanks] flag words, written by that source
  std::int64_t outbox = 0;  // [kMaxRanks][channel][slot] message headers, written by this rank for that destination
  std::int64_t total = 0;
  static constexpr std::int64_t kHelloBytes = 4096;
  static constexpr std::int64_t kInboxBytes = 64;  // a source's own cache line
  static constexpr std::int64_t kHeaderBytes = 128;

  NIXL_HD constexpr std::int64_t inbox_of(int source) const { return inbox + source * kInboxBytes; }
  NIXL_HD constexpr std::int64_t header_of(int destination, int channel, int slot) const {
    return outbox + (std::int64_t{4} * destination + 2 * channel + slot) * kHeaderBytes;
  }
};
NIXL_HD constexpr ControlLayout make_control_layout() {
  ControlLayout layout;
  Walk walk;
  layout.hello = walk.take(ControlLayout::kHelloBytes, 4096);
  layout.inbox = walk.take(kMaxRanks * ControlLayout::kInboxBytes, 4096);
  layout.outbox = walk.take(4 * kMaxRanks * ControlLayout::kHeaderBytes, 4096);
  layout.total = walk.total(4096);
  return layout;
}

// What a rank stages in one slot for a dispatch, once for all destinations. Entries are sorted by (destination rank,
// local expert), so entries[begin[e] .. begin[e + 1]) are what expert e of the call gets from this rank.
struct DispatchStage {
  std::int64_t begin = 0;    // int32 [R * L + 1]
  std::int64_t entries = 0;  // Entry [num_entries]
  std::int64_t weights = 0;  // float [num_entries], when weights travel
  std::int64_t rows = 0;     // [n] rows of row_stride bytes
  std::int64_t scales = 0;   // 32-bit words [n][scale_words]
  std::int64_t row_stride = 0;
  std::int64_t total = 0;
};
NIXL_HD constexpr DispatchStage make_dispatch_stage(std::int64_t num_experts, std::int64_t num_entries,
                                                    std::int64_t num_tokens, std::int64_t hidden, int payload,
                                                    bool with_weights) {
  DispatchStage stage;
  Walk walk;
  stage.begin = walk.take(4 * (num_experts + 1));
  stage.entries = walk.take(4 * num_entries);
  stage.weights = walk.take(with_weights ? 4 * num_entries : 0);
  stage.row_stride = align_up<std::int64_t>(row_bytes(payload, hidden), 64);
  stage.rows = walk.take(num_tokens * stage.row_stride);
  stage.scales = walk.take(4 * num_tokens * scale_words(payload, hidden));
  stage.total = walk.total();
  return stage;
}

// What a rank stages in one slot for a combine: rows for the owners of tokens, in blocks. Exact: a block for each
// (owner, local expert); reduced: one for each owner.
struct CombineStage {
  std::int64_t begin = 0;   // int32 [num_blocks + 1]: a block's first token and first staged row
  std::int64_t first = 0;   // int64 [num_blocks]: offset in data memory of a block's first row
  std::int64_t tokens = 0;  // int32 [num_rows]: token index at the owner, ascending inside a block
  std::int64_t rows = 0;    // [num_rows] rows of 2 * hidden bytes, unless they are read where the caller put them
  std::int64_t row_stride = 0;
  std::int64_t total = 0;
};
NIXL_HD constexpr CombineStage make_combine_stage(std::int64_t num_blocks, std::int64_t num_rows, std::int64_t hidden,
                                                  bool rows_in_place) {
  CombineStage stage;
  Walk walk;
  stage.begin = walk.take(4 * (num_blocks + 1));
  stage.first = walk.take(8 * num_blocks);
  stage.tokens = walk.take(4 * num_rows);
  stage.row_stride = align_up<std::int64_t>(2 * hidden, 64);
  stage.rows = walk.take(rows_in_place ? 0 : num_rows * stage.row_stride);
  stage.total = walk.total();
  return stage;
}

// The rows a caller writes for a combine without copy: bf16 [L, T, H] with this stride between rows, in elements.
NIXL_HD constexpr std::int64_t zero_copy_row_stride(std::int64_t hidden) {
  return hidden + hidden / 64;
}

}  // namespace nixl::core::ep
