// Pieces of bfloat16 rows on the link: chunks, then the words that their tags displaced (ep/layout/push.h).
#pragma once
#include "ep/cuda/device/line.cuh"

namespace nixl::core::ep::gpu {

// Sends the chunks of one piece as they are made, and after them the words that their tags displaced. One warp.
template <int kLanes>
class PieceSender {
  using Line = Lines<kLanes>;

 public:
  __device__ PieceSender(const RowShape& shape, std::uint8_t* to, std::uint32_t tag)
      : to_(to), tail_(to + shape.per * kChunkBytes), tag_(tag) {}
  __device__ __forceinline__ void send(int chunk, int lane, uint4 v) {
    Line::store(to_ + chunk * kChunkBytes, lane, v, tag_);
    if (kLanes == 1) {  // eleven cells take the 32 words
      uint4 cell;
      cell.x = __shfl_sync(~0u, v.w, 3 * lane % 32);
      cell.y = __shfl_sync(~0u, v.w, (3 * lane + 1) % 32);
      cell.z = __shfl_sync(~0u, v.w, (3 * lane + 2) % 32);
      cell.w = tag_;
      if (lane < 11) store_cell(tail_ + (chunk * 11 + lane) * 16, cell);
    } else {  // lane 4 * c + q carries what line q of chunk c displaced
      const std::uint32_t word = __shfl_sync(~0u, v.w, lane % 4 * 8 + 7);
      if (lane / 4 == chunk) displaced_ = word;
    }
  }
  __device__ __forceinline__ void finish(int lane) {
    if (kLanes == 1) return;
    __syncwarp();
    store_word(tail_ + lane * 4, lane == 31 ? tag_ : displaced_);
  }

 private:
  std::uint8_t* to_;
  std::uint8_t* tail_;
  std::uint32_t tag_;
  std::uint32_t displaced_ = 0;
};

// A chunk of a row on its way in, and where the words are that its tags displaced.
template <int kLanes>
struct Arriving {
  using Line = Lines<kLanes>;
  uint4 data;
  std::uint32_t
      word;  // of the tail: this lane's of the line; with 16-byte lines the one that this lane's tag displaced
  std::uint32_t word_tag;  // with 16-byte lines: beside that word

  // Where this lane reads in the tail of a piece.
  static __device__ __forceinline__ int tail_at(int chunk, int lane) {
    return kLanes == 1 ? (chunk * 11 + lane / 3) * 16 : lane * 4;
  }
  // `at`, `tail`: offsets inside the row of the chunk and of what this lane reads of its tail, if there is one.
  __device__ __forceinline__ void load(const std::uint8_t* row, int at, int tail, int lane, bool with_tail = true) {
    data = Line::load(row + at, lane);
    if (!with_tail) return;
    if (kLanes == 1) {
      const uint4 cell = load_cell(row + tail);
      const int q = lane % 3;
      word = q == 0 ? cell.x : q == 1 ? cell.y : cell.z;
      word_tag = cell.w;
    } else {
      word = load_word(row + tail);
    }
  }
  __device__ __forceinline__ bool fresh(int lane, std::uint32_t tag) const {
    return Line::fresh(data, lane, tag) && (kLanes == 1 ? word_tag == tag : lane != 31 || word == tag);
  }
  __device__ __forceinline__ uint4 value(int chunk, int lane, bool with_tail = true) const {
    const std::uint32_t displaced = kLanes == 1 ? word : __shfl_sync(~0u, word, 4 * chunk + lane / 8);
    uint4 v = data;
    if (with_tail && Line::holds_tag(lane)) v.w = displaced;
    return v;
  }
};

}  // namespace nixl::core::ep::gpu
