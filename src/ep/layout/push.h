// Rows on a link whose receiver is another GPU: lines that carry their own flag, so that neither side needs a fence, an
// acknowledgement or a second message.
//
// A line is 16 * lanes bytes written by `lanes` neighbouring threads of one warp with one instruction; its last word is the
// tag of the operation. A chunk is what a warp moves at once: 512 bytes, 32 / lanes lines. The word a tag displaces travels
// in the tail lines of its piece, in front of the scales and of what says where the row belongs. A piece is what one warp
// sends: `per` data chunks, then `tail_lines` lines. docs/ep_layout.md draws it.
#pragma once
#include <cstdint>

#include "ep/layout/shape.h"

namespace nixl::core::ep {

inline constexpr int kChunkBytes = 512;

// How lines are cut. 8 lanes: 128-byte lines, which arrive whole between GPUs joined by NVLink; 1 lane: 16-byte cells, single
// accesses of the memory model, good anywhere.
NIXL_HD constexpr int lines_in_chunk(int lanes) {
  return 32 / lanes;
}
NIXL_HD constexpr int words_in_line(int lanes) {
  return 4 * lanes - 1;
}  // without the tag
// Tail words that a chunk's displaced words take: with 16-byte lines a whole number of lines.
NIXL_HD constexpr int displaced_in_chunk(int lanes) {
  return lanes == 1 ? 33 : lines_in_chunk(lanes);
}

struct RowShape {
  int chunks = 0;  // of the row
  int per = 0;     // data chunks in a piece, the last piece may have fewer
  int pieces = 0;
  int tail_lines = 0;  // of a piece
  int piece_bytes = 0;
  int row_bytes = 0;  // on the link

  NIXL_HD constexpr int chunks_of(int piece) const {
    const int left = chunks - piece * per;
    return left < per ? left : per;
  }
};
// row_bytes: payload; chunk_words: 32-bit words of scales that go with a chunk; meta_words: words that go with every piece.
NIXL_HD constexpr RowShape make_row_shape(std::int64_t row_bytes, int wanted_per, int chunk_words, int meta_words,
                                          int lanes) {
  RowShape shape;
  shape.chunks = static_cast<int>((row_bytes + kChunkBytes - 1) / kChunkBytes);
  shape.pieces = (shape.chunks + wanted_per - 1) / wanted_per;
  shape.per = (shape.chunks + shape.pieces - 1) / shape.pieces;
  shape.pieces = (shape.chunks + shape.per - 1) / shape.per;
  const int words = shape.per * (displaced_in_chunk(lanes) + chunk_words) + meta_words;
  shape.tail_lines = (words + words_in_line(lanes) - 1) / words_in_line(lanes);
  shape.piece_bytes = shape.per * kChunkBytes + shape.tail_lines * 16 * lanes;
  shape.row_bytes = shape.pieces * shape.piece_bytes;
  return shape;
}

// The data memory of a rank: an area for rows that are addressed by (token, place), then for every source two slots.
struct PushLayout {
  std::int64_t slot_bytes = 0;
  std::int64_t exact_bytes = 0;  // of one of two areas
  NIXL_HD constexpr std::int64_t slot_of(int source, std::uint32_t slot) const {
    return 2 * exact_bytes + (std::int64_t{2} * source + slot) * slot_bytes;
  }
  NIXL_HD constexpr std::int64_t exact_of(std::uint32_t parity) const { return parity * exact_bytes; }
  NIXL_HD constexpr std::int64_t total(int num_ranks) const { return slot_of(num_ranks, 0); }
};
// Sized by the elements (tokens * hidden) that a buffer of num_bytes stands for: a slot takes one row of every token with
// its lines, tails and weights; an exact area one row of every (token, place) for a top-k of up to 16. The same for any
// number of ranks, and elements are rounded up to a 32nd of their size: ranks that grew and ranks that started with the
// larger capacity must agree.
NIXL_HD constexpr PushLayout make_push_layout(std::int64_t num_bytes, std::int64_t num_experts) {
  PushLayout layout;
  const std::int64_t found = max_elements(num_bytes, num_experts);
  std::int64_t step = 4096;
  while (step * 64 < found) step *= 2;
  const std::int64_t elements = align_up(found + step / 2, step);
  constexpr std::int64_t kSmall = 512 << 10;  // short rows have long tails
  layout.slot_bytes = align_up<std::int64_t>(elements * 11 / 4 + kSmall, 4096);
  layout.exact_bytes = align_up<std::int64_t>(elements * 9 / 4 * 16 + 4 * kSmall, 4096);
  return layout;
}

// What dispatch leaves for combine, in memory of the caller: which of its rows came from which message, so that rows can go
// home without anybody asking for them, and what the rank's own tokens have to wait for.
//   counts    int32 [ranks]: messages of each source
//   messages  [ranks][max_tokens]: {token at the source, entries}, then {row, place in the top-k} of every entry by place;
//             row counts over all local experts' rows of the output
//   routes    [max_tokens][topk] of own tokens: {the message that carries this entry, or on the own rank its row; -1: none,
//             number of the entry among the message's}
//   turns     uint8 [max_tokens][topk]: the places of a token by rank, then place; those that nothing comes from are last
struct RecordLayout {
  std::int64_t counts = 0, messages = 0, routes = 0, turns = 0, total = 0;
  int message_bytes = 0;
  NIXL_HD constexpr std::int64_t message_of(int source, std::int64_t max_tokens, std::int64_t message) const {
    return messages + (source * max_tokens + message) * message_bytes;
  }
};
NIXL_HD constexpr RecordLayout make_record_layout(std::int64_t max_tokens, int topk, int num_ranks) {
  RecordLayout layout;
  layout.message_bytes = 8 + 8 * topk;
  Walk walk;
  layout.counts = walk.take(4 * std::int64_t{num_ranks}, 16);
  layout.messages = walk.take(num_ranks * max_tokens * layout.message_bytes, 16);
  layout.routes = walk.take(8 * max_tokens * topk, 16);
  layout.turns = walk.take(max_tokens * topk, 16);
  layout.total = walk.total(16);
  return layout;
}

// Control memory of a rank: who is waiting for whom, then for every source and slot a header and cells of counts.
struct PushControl {
  std::int64_t headers = 0;  // [ranks][2] of 16 bytes
  std::int64_t counts = 0;   // [ranks][2][cells] of 16 bytes: three counts and a tag
  int cells = 0;
  std::int64_t total = 0;
  NIXL_HD constexpr std::int64_t header_of(int source, std::uint32_t slot) const {
    return headers + (std::int64_t{2} * source + slot) * 16;
  }
  NIXL_HD constexpr std::int64_t counts_of(int source, std::uint32_t slot) const {
    return counts + (std::int64_t{2} * source + slot) * cells * 16;
  }
};
NIXL_HD constexpr PushControl make_push_control(int experts_per_rank, int num_ranks) {
  PushControl control;
  control.cells = (experts_per_rank + 2) / 3;
  Walk walk;
  walk.take(4096);
  control.headers = walk.take(std::int64_t{kMaxRanks} * 2 * 16, 4096);
  control.counts = walk.take(std::int64_t{num_ranks} * 2 * control.cells * 16, 4096);
  control.total = walk.total(4096);
  return control;
}

// What every line and cell of an operation carries: mixes the sender's incarnation with its count, never 0, so that zeroed
// memory holds nothing; even and odd counts differ, as do neighbouring ones.
NIXL_HD constexpr std::uint32_t make_tag(std::uint32_t incarnation, std::uint32_t count) {
  return (incarnation * 0x9e3779b1u + 2 * count) | 1;
}

}  // namespace nixl::core::ep
