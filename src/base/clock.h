// Monotonic time and deadlines. Every wait of the project takes a Deadline; wall-clock jumps do not move it.
#pragma once
#include <cstdint>
#include <ctime>

namespace nixl::core {

using Nanoseconds = std::int64_t;

Nanoseconds now_ns() noexcept;  // CLOCK_MONOTONIC

class Deadline {
 public:
  static Deadline after(Nanoseconds delay) noexcept;  // saturates: a delay too large to add means "never"
  static constexpr Deadline never() noexcept { return Deadline(INT64_MAX); }
  static constexpr Deadline passed_already() noexcept { return Deadline(0); }

  bool passed() const noexcept { return at_ != INT64_MAX && now_ns() >= at_; }
  Nanoseconds left() const noexcept;  // >= 0
  // The time left in milliseconds, rounded up, for poll(); at most `cap_ms`.
  int left_ms(int cap_ms = 1 << 30) const noexcept;
  timespec left_timespec() const noexcept;
  constexpr Nanoseconds at() const noexcept { return at_; }
  Deadline earlier(Deadline other) const noexcept { return at_ < other.at_ ? *this : other; }

 private:
  constexpr explicit Deadline(Nanoseconds at) noexcept : at_(at) {}
  Nanoseconds at_;
};

}  // namespace nixl::core
