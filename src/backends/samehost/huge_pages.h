// Huge pages under registered host memory. The kernel looks up another process's pages one by one for every copy; with
// pages of 2 MiB that takes a third of the time. A thread of this backend gathers the pages of what is registered, from
// the moment a peer of this host is there; contents and addresses stay as they are, and the owner may use, give back or
// free the memory at any time.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "base/result.h"
#include "contract/memory.h"

namespace nixl::core::samehost {

// Thread-safe.
class HugePages {
 public:
  static constexpr const char* kParam = "same_host_huge_pages";
  static constexpr const char* kEnv = "NIXL_SAME_HOST_HUGE_PAGES";

  // Null where they are switched off (by parameter or environment) or the system has none; the log says so at debug.
  static Result<std::shared_ptr<HugePages>> open(const Params& params);
  ~HugePages();  // waits for the step under way: some 10 ms, on a busy machine up to a second

  // Takes note of a region; 0: it covers no whole huge page.
  std::uint64_t add(std::uint64_t address, std::uint64_t length);
  void remove(std::uint64_t number) noexcept;
  // A peer of this host is there: begins.
  void start();

 private:
  struct Range {
    std::uint64_t begin, end, next;  // whole huge pages
    std::uint64_t gathered = 0;      // bytes in huge pages after this round
    int round = 0;
    bool advised = false;
  };
  HugePages(std::uint64_t huge_bytes, std::uint64_t page_bytes);
  void work();
  void step(std::unique_lock<std::mutex>& lock);
  std::uint64_t gather(std::uint64_t begin, std::uint64_t end) const noexcept;

  const std::uint64_t huge_bytes_, page_bytes_;
  const int owner_;  // process; a forked child has the object but not the thread
  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<std::uint64_t, Range> ranges_;
  std::deque<std::uint64_t> now_, later_;  // numbers of ranges to look at
  std::uint64_t next_number_ = 1;
  std::size_t num_advised_ = 0;
  Nanoseconds later_at_ = 0;
  bool started_ = false, stop_ = false;
  std::thread thread_;
};

// A region's entry in HugePages; removes it when destroyed.
class HugeRange {
 public:
  HugeRange() = default;
  HugeRange(std::shared_ptr<HugePages> pages, std::uint64_t address, std::uint64_t length)
      : pages_(std::move(pages)), number_(pages_ ? pages_->add(address, length) : 0) {}
  HugeRange(HugeRange&& other) noexcept : pages_(std::move(other.pages_)), number_(std::exchange(other.number_, 0)) {}
  ~HugeRange() {
    if (number_) pages_->remove(number_);
  }

 private:
  std::shared_ptr<HugePages> pages_;
  std::uint64_t number_ = 0;
};

}  // namespace nixl::core::samehost
