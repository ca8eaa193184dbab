#include "backends/samehost/huge_pages.h"

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <ctime>
#include <fstream>
#include <string>
#include <system_error>
#include <vector>

#include "base/env.h"
#include "base/log.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

namespace nixl::core::samehost {
namespace {

constexpr std::uint64_t kStepBytes =
    64 << 20;               // about 10 ms; page faults of this process wait for one huge page at most
constexpr int kRounds = 3;  // pages that were in use are tried again
constexpr Nanoseconds kRoundEvery = 500'000'000;
// Advice splits mappings, and a process may have 65,530 of them.
constexpr std::size_t kMaxAdvised = 1024;

std::string first_line(const char* path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

Nanoseconds own_cpu_time() noexcept {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return t.tv_sec * 1'000'000'000LL + t.tv_nsec;
}

// Gathering may take memory: what a fork shares is no longer shared afterwards.
bool memory_is_scarce() {
  std::ifstream file("/proc/meminfo");
  std::uint64_t total = 0, available = 0;
  for (std::string word; file >> word;) {
    if (word == "MemTotal:") file >> total;
    if (word == "MemAvailable:") {
      file >> available;
      break;
    }
  }
  return available < total / 8;
}

// Empty where huge pages can be used, else why not. `bytes` of one.
std::string why_not(std::uint64_t& bytes) {
  const std::string mode = first_line("/sys/kernel/mm/transparent_hugepage/enabled");
  if (mode.empty()) return "the kernel has no transparent huge pages";
  if (mode.find("[never]") != std::string::npos) return "/sys/kernel/mm/transparent_hugepage/enabled says never";
  if (::prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 1) return "this process has them disabled (PR_SET_THP_DISABLE)";
  const auto size = parse_int(first_line("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size"));
  if (!size || *size <= 0 || *size > static_cast<std::int64_t>(kStepBytes)) return "a huge page has no size of use";
  bytes = static_cast<std::uint64_t>(*size);
  return "";
}

}  // namespace

Result<std::shared_ptr<HugePages>> HugePages::open(const Params& params) {
  NIXL_ASSIGN(std::optional<bool> wanted, env_bool(kEnv));
  const auto given = params.find(kParam);
  if (!wanted && given != params.end() && !given->second.empty()) {
    wanted = parse_bool(given->second);
    if (!wanted)
      return fail(Code::kInvalidArgument, "parameter %s = '%s'; allowed: true or false", kParam, given->second.c_str());
  }
  std::uint64_t bytes = 0;
  const std::string reason = wanted.value_or(true) ? why_not(bytes) : "switched off";
  if (!reason.empty()) {
    NIXL_DEBUG("registered host memory keeps its pages: %s", reason.c_str());
    return nullptr;
  }
  // A forked child must not wait for the thread that it does not have, nor for the locks which that held.
  return std::shared_ptr<HugePages>(new HugePages(bytes, static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))),
                                    [owner = ::getpid()](HugePages* pages) {
                                      if (::getpid() == owner) delete pages;
                                    });
}

HugePages::HugePages(std::uint64_t huge_bytes, std::uint64_t page_bytes)
    : huge_bytes_(huge_bytes), page_bytes_(page_bytes), owner_(::getpid()) {}

HugePages::~HugePages() {
  {
    std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

std::uint64_t HugePages::add(std::uint64_t address, std::uint64_t length) {
  if (::getpid() != owner_) return 0;
  const std::uint64_t begin = (address + huge_bytes_ - 1) / huge_bytes_ * huge_bytes_;
  const std::uint64_t end = (address + length) / huge_bytes_ * huge_bytes_;
  if (begin >= end) return 0;
  std::lock_guard lock(mutex_);
  const std::uint64_t number = next_number_++;
  ranges_[number] = {begin, end, begin};
  now_.push_back(number);
  if (started_) wake_.notify_all();
  return number;
}

void HugePages::remove(std::uint64_t number) noexcept {
  if (::getpid() != owner_) return;
  std::lock_guard lock(mutex_);
  const auto found = ranges_.find(number);
  if (found == ranges_.end()) return;
  if (found->second.advised) --num_advised_;
  ranges_.erase(found);
}

void HugePages::start() {
  std::lock_guard lock(mutex_);
  if (std::exchange(started_, true)) return;
  sigset_t all, before;  // signals are for the program's own threads
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { work(); });
    pthread_setname_np(thread_.native_handle(), "nixl-pages");
  } catch (const std::system_error& error) {
    NIXL_DEBUG("registered host memory keeps its pages: no thread can be started (%s)", error.what());
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void HugePages::work() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    if (!now_.empty()) {
      const Nanoseconds began = own_cpu_time();
      step(lock);
      // Half of a core at most. On a busy machine most of the time of a step is waiting, which costs nobody anything.
      const auto pause = std::chrono::nanoseconds(own_cpu_time() - began);
      wake_.wait_for(lock, pause, [this] { return stop_; });
    } else if (!later_.empty()) {
      const auto pause = std::chrono::nanoseconds(std::max<Nanoseconds>(0, later_at_ - now_ns()));
      if (!wake_.wait_for(lock, pause, [this] { return stop_ || !now_.empty(); })) now_.swap(later_);
    } else {
      wake_.wait(lock, [this] { return stop_ || !now_.empty(); });
    }
  }
}

// The next piece of the first range in line; unlocked while the kernel works.
void HugePages::step(std::unique_lock<std::mutex>& lock) {
  const std::uint64_t number = now_.front();
  auto found = ranges_.find(number);
  if (found == ranges_.end()) {
    now_.pop_front();
    return;
  }
  Range& range = found->second;
  const std::uint64_t begin = range.next, end = std::min(range.end, begin + kStepBytes);
  if (!range.advised && range.round == 0 && num_advised_ < kMaxAdvised) {
    // What was not touched yet becomes huge at the first touch, by us or by a peer.
    (void)::madvise(reinterpret_cast<void*>(range.begin), range.end - range.begin, MADV_HUGEPAGE);
    range.advised = true;
    ++num_advised_;
  }
  range.next = end;
  lock.unlock();
  const std::uint64_t gathered = gather(begin, end);
  lock.lock();
  found = ranges_.find(number);
  if (found == ranges_.end()) return;  // given back meanwhile; the next step drops it from the line
  Range& same = found->second;
  same.gathered += gathered;
  if (same.next < same.end) return;
  now_.pop_front();
  NIXL_DEBUG("host memory at %#llx: %llu of %llu MiB are in huge pages", static_cast<unsigned long long>(same.begin),
             static_cast<unsigned long long>(same.gathered >> 20),
             static_cast<unsigned long long>((same.end - same.begin) >> 20));
  if (same.gathered < same.end - same.begin && ++same.round < kRounds) {
    same.next = same.begin;
    same.gathered = 0;
    if (later_.empty()) later_at_ = now_ns() + kRoundEvery;
    later_.push_back(number);
  }
}

// Bytes of it that are in huge pages afterwards. The memory may be gone by now: the kernel refuses what it cannot do.
std::uint64_t HugePages::gather(std::uint64_t begin, std::uint64_t end) const noexcept {
  std::vector<unsigned char> present((end - begin) / page_bytes_);
  if (memory_is_scarce() || ::mincore(reinterpret_cast<void*>(begin), end - begin, present.data()) != 0) return 0;
  const std::uint64_t pages = huge_bytes_ / page_bytes_;
  // Memory that its owner left untouched must not be filled: seven eighths of a huge page have to be there already.
  const auto is_full = [&](std::uint64_t at) {
    const auto first = present.begin() + static_cast<std::ptrdiff_t>((at - begin) / page_bytes_);
    const auto count = std::count_if(first, first + static_cast<std::ptrdiff_t>(pages), [](auto p) { return p & 1; });
    return static_cast<std::uint64_t>(count) >= pages / 8 * 7;
  };
  std::uint64_t gathered = 0;
  for (std::uint64_t at = begin; at < end;) {
    std::uint64_t to = at;
    while (to < end && is_full(to)) to += huge_bytes_;
    if (to > at && ::madvise(reinterpret_cast<void*>(at), to - at, MADV_COLLAPSE) == 0) gathered += to - at;
    at = std::max(to, at + huge_bytes_);
  }
  return gathered;
}

}  // namespace nixl::core::samehost
