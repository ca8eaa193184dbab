// Bounds of a group and of one call, and how many bytes they stand for. Pure arithmetic for host and device.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define NIXL_HD __host__ __device__
#else
#define NIXL_HD
#endif

namespace nixl::core::ep {

inline constexpr int kMaxRanks = 1024;
inline constexpr int kMaxTopk = 32;
inline constexpr std::int64_t kMaxHidden = 16384;
inline constexpr std::int64_t kMostExperts = 1 << 18;      // of all ranks: so that every size stays below 2^63
inline constexpr std::int64_t kMaxTokens = (1 << 27) - 1;  // an entry packs token and place in the top-k into 32 bits
inline constexpr std::int64_t kGroup = 128;                // channels that share a scale

template <typename T>
NIXL_HD constexpr T align_up(T value, T alignment) {
  return (value + alignment - 1) / alignment * alignment;
}

// Division by a number that a launch knows beforehand, as a multiplication: right for every n below 2^32 / divisor.
class Divisor {
 public:
  Divisor() = default;
  explicit constexpr Divisor(std::uint32_t divisor)
      : inverse_(divisor < 2 ? 0 : static_cast<std::uint32_t>(((1ull << 32) + divisor - 1) / divisor)) {}
  NIXL_HD constexpr std::uint32_t quotient(std::uint32_t n) const {
    return inverse_ == 0 ? n : static_cast<std::uint32_t>(std::uint64_t{n} * inverse_ >> 32);
  }

 private:
  std::uint32_t inverse_ = 0;  // 2^32 / divisor, rounded up; 0: by 1
};

// Hands out consecutive ranges; the walk that gives the offsets also gives the total, so the two cannot disagree.
class Walk {
 public:
  NIXL_HD constexpr explicit Walk(std::int64_t start = 0) : at_(start) {}
  NIXL_HD constexpr std::int64_t take(std::int64_t bytes, std::int64_t alignment = 64) {
    const std::int64_t offset = align_up(at_, alignment);
    at_ = offset + bytes;
    return offset;
  }
  NIXL_HD constexpr std::int64_t total(std::int64_t alignment = 64) const { return align_up(at_, alignment); }

 private:
  std::int64_t at_;
};

// Bytes by which callers size a buffer: two slots of what the classic layout sends, receives and signals, a row of M
// tokens for each of E experts. The paths need less, but size, and what a size allows, are agreed in these terms.
NIXL_HD constexpr std::int64_t classic_bytes(std::int64_t max_tokens, std::int64_t hidden, std::int64_t num_experts) {
  const std::int64_t scales = 4 * (hidden / kGroup);
  const std::int64_t with_fp8 = hidden + scales;
  const std::int64_t dispatch_row = 16 + (2 * hidden > with_fp8 ? 2 * hidden : with_fp8);
  const std::int64_t combine_row = scales + 2 * hidden;
  const std::int64_t wider = dispatch_row > combine_row ? dispatch_row : combine_row;
  const std::int64_t by_token = max_tokens * dispatch_row;
  const std::int64_t by_expert = num_experts * max_tokens * combine_row;
  const std::int64_t send = by_token > by_expert ? by_token : by_expert;
  const std::int64_t receive = num_experts * max_tokens * wider;
  return 2 * (send + receive + align_up<std::int64_t>(8 * num_experts, 128));
}
NIXL_HD constexpr std::int64_t size_hint_bytes(std::int64_t max_tokens, std::int64_t hidden, std::int64_t num_experts) {
  return (classic_bytes(max_tokens, hidden, num_experts) / 128 + 1) * 128;
}

// Whether a buffer of `num_bytes` for `num_experts` experts in all serves calls of (max_tokens, hidden).
NIXL_HD constexpr bool allows(std::int64_t num_bytes, std::int64_t num_experts, std::int64_t max_tokens,
                              std::int64_t hidden) {
  return classic_bytes(max_tokens, hidden, num_experts) <= num_bytes;
}
// The inverse: no call that `allows` accepts has max_tokens * hidden above this.
NIXL_HD constexpr std::int64_t max_elements(std::int64_t num_bytes, std::int64_t num_experts) {
  return num_bytes / (8 * num_experts);  // send and receive, two slots, two bytes an element, scales ignored
}
// No call that `allows` accepts at this hidden size has more tokens than this.
NIXL_HD constexpr std::int64_t max_tokens_for(std::int64_t num_bytes, std::int64_t num_experts, std::int64_t hidden) {
  const std::int64_t one_token = classic_bytes(1, hidden, num_experts) - classic_bytes(0, hidden, num_experts);
  const std::int64_t left = num_bytes - classic_bytes(0, hidden, num_experts);
  return left < 0 ? 0 : left / one_token;
}

}  // namespace nixl::core::ep
