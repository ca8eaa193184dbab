#include "base/clock.h"

#include <algorithm>

namespace nixl::core {

Nanoseconds now_ns() noexcept {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

Deadline Deadline::after(Nanoseconds delay) noexcept {
  const Nanoseconds now = now_ns();
  return delay > INT64_MAX - now ? never() : Deadline(now + std::max<Nanoseconds>(delay, 0));
}

Nanoseconds Deadline::left() const noexcept {
  if (at_ == INT64_MAX) return INT64_MAX;
  return std::max<Nanoseconds>(at_ - now_ns(), 0);
}

int Deadline::left_ms(int cap_ms) const noexcept {
  const Nanoseconds ns = left();
  if (ns / 1'000'000 >= cap_ms) return cap_ms;
  return static_cast<int>((ns + 999'999) / 1'000'000);
}

timespec Deadline::left_timespec() const noexcept {
  const Nanoseconds ns = std::min<Nanoseconds>(left(), 1'000'000'000LL * 86'400 * 365);
  return {static_cast<time_t>(ns / 1'000'000'000), static_cast<long>(ns % 1'000'000'000)};
}

}  // namespace nixl::core
