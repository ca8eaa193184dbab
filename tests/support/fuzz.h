// Damaged input for readers of bytes from outside: fuzz(good, read) gives `read` every prefix of `good`, then random changes of it;
// `read` must answer and may not crash. Twenty thousand changes from one seed; NIXL_FUZZ_SECONDS=N goes on for N seconds from another
// seed each time, which is printed and can be given again as NIXL_FUZZ_SEED.
#pragma once
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace check {

class Fuzz {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Fuzz(int rounds = 20'000) : rounds_(rounds) {
    const char* seconds = std::getenv("NIXL_FUZZ_SECONDS");
    const char* seed = std::getenv("NIXL_FUZZ_SEED");
    seed_ = seed ? std::strtoull(seed, nullptr, 10) : seconds ? std::random_device()() : 7;
    random.seed(seed_);
    if (!seconds) return;
    end_ = Clock::now() + std::chrono::seconds(std::strtol(seconds, nullptr, 10));
    std::fprintf(stderr, "  NIXL_FUZZ_SEED=%llu\n", static_cast<unsigned long long>(seed_));
  }
  ~Fuzz() {
    if (end_ != Clock::time_point()) std::fprintf(stderr, "  %lld rounds\n", done_);
  }
  bool more() { return ++done_ <= rounds_ || (done_ % 64 ? end_ != Clock::time_point() : Clock::now() < end_); }
  bool one_in(unsigned n) { return random() % n == 0; }
  // A number that readers are likely to stumble over.
  std::uint64_t number() {
    switch (random() % 6) {
      case 0:
        return random() % 3;
      case 1:
        return ~std::uint64_t{0} - random() % 3;
      case 2:
        return (std::uint64_t{1} << random() % 64) - random() % 2;
      case 3:
        return random() % 70'000;
      case 4:
        return static_cast<std::uint64_t>(-static_cast<std::int64_t>(random() % 70'000));
      default:
        return random();
    }
  }
  // A few random changes of `good`; never empty.
  std::string changed(std::string bytes) {
    for (std::uint64_t changes = 1 + random() % 6; changes && !bytes.empty(); --changes) {
      const std::size_t at = random() % bytes.size();
      switch (random() % 7) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
          break;
        case 2:
          bytes.insert(at, 1, static_cast<char>(random()));
          break;
        case 3:
          bytes.erase(at, 1 + random() % 8);
          break;
        case 4: {
          const std::size_t from = random() % bytes.size();
          bytes.insert(at, bytes.substr(from, 1 + random() % 16));
          break;
        }
        case 5: {
          const std::uint64_t value = number();
          const std::size_t size = std::min<std::size_t>(std::size_t{1} << random() % 4, bytes.size() - at);
          bytes.replace(at, size, reinterpret_cast<const char*>(&value), size);
          break;
        }
        default:
          bytes.replace(at, std::min<std::size_t>(8, bytes.size() - at), 8, static_cast<char>(0xff));
          break;
      }
    }
    return bytes.empty() ? "x" : bytes;
  }

  std::mt19937_64 random;

 private:
  const long long rounds_;
  std::uint64_t seed_ = 0;
  long long done_ = 0;
  Clock::time_point end_{};
};

template <typename Read>
void fuzz(const std::string& good, Read&& read, int num_rounds = 20'000) {
  for (std::size_t cut = 0; cut < good.size(); ++cut) read(good.substr(0, cut));
  for (Fuzz rounds(num_rounds); rounds.more();) read(rounds.changed(good));
}

}  // namespace check
