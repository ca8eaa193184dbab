// For the tests: ranks of one process with a page each, and what of them is left in it.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "ep/group/group.h"

namespace nixl::core::ep::test {

inline constexpr Nanoseconds kMs = 1'000'000;
inline constexpr int kExperts = 4;
inline constexpr std::size_t kPage = 4096;

inline std::size_t open_descriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
  return count;
}

// Callers that hung up are closed by the listening thread a moment later.
inline bool descriptors_settle_at(std::size_t count) {
  const Deadline deadline = Deadline::after(10'000 * kMs);
  while (open_descriptors() != count)
    if (deadline.passed()) return false;
  return true;
}

inline std::size_t mappings_of(const std::string& name) {
  std::ifstream maps("/proc/self/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) count += line.find(name) != std::string::npos;
  return count;
}

// One page that peers map for real; says who it belongs to.
class PageMemory final : public PeerMemory {
 public:
  explicit PageMemory(int rank) : rank_(rank), file_(::memfd_create("group_test_page", MFD_CLOEXEC)) {
    CHECK(file_);
    CHECK_EQ(::ftruncate(file_.get(), kPage), 0);
    CHECK_EQ(::pwrite(file_.get(), &rank_, sizeof(rank_), 0), ssize_t(sizeof(rank_)));
  }
  ~PageMemory() override {
    for (auto& [rank, page] : pages_) ::munmap(page, kPage);
  }
  Result<Export> export_memory() override {
    Export made;
    made.description = "page of " + std::to_string(rank_);
    NIXL_ASSIGN(Fd copy, file_.duplicate());
    made.descriptors.push_back(std::move(copy));
    return made;
  }
  Result<void> attach(const PeerIdentity& peer, Export memory) override {
    const std::lock_guard lock(mutex_);
    if (calls_until_failure >= 0 && calls_until_failure-- == 0) return fail(Code::kIo, "attach told to fail");
    CHECK_EQ(memory.description, "page of " + std::to_string(peer.rank));
    void* page = ::mmap(nullptr, kPage, PROT_READ, MAP_SHARED, memory.descriptors.at(0).get(), 0);
    CHECK(page != MAP_FAILED);
    CHECK_EQ(*static_cast<int*>(page), peer.rank);
    CHECK(pages_.emplace(peer.rank, page).second);
    incarnations_[peer.rank] = peer.incarnation;
    return {};
  }
  Result<void> detach(int rank) override {
    const std::lock_guard lock(mutex_);
    const auto found = pages_.find(rank);
    CHECK(found != pages_.end());
    ::munmap(found->second, kPage);
    pages_.erase(found);
    return {};
  }
  std::set<int> attached() const {
    const std::lock_guard lock(mutex_);
    std::set<int> ranks;
    for (const auto& [rank, page] : pages_) ranks.insert(rank);
    return ranks;
  }
  std::uint32_t incarnation_of(int rank) const {
    const std::lock_guard lock(mutex_);
    return incarnations_.at(rank);
  }
  int calls_until_failure = -1;

 private:
  const int rank_;
  Fd file_;
  mutable std::mutex mutex_;
  std::map<int, void*> pages_;
  std::map<int, std::uint32_t> incarnations_;
};

inline std::uint32_t next_incarnation() {
  static std::atomic<std::uint32_t> next{0x1000};
  return ++next;
}

struct Rank {
  Rank(int number, std::shared_ptr<Store> store, Nanoseconds timeout_ns = 20'000 * kMs, int experts = kExperts)
      : memory(number),
        incarnation(next_incarnation()),
        group(std::move(*CHECK_OK(Group::open({number, incarnation, experts, timeout_ns}, memory)))) {
    group->set_store(std::move(store));
  }
  ~Rank() { group->close(); }
  PageMemory memory;
  std::uint32_t incarnation;
  std::unique_ptr<Group> group;
};

using Outcome = Result<std::vector<int>>;

// Runs one function a rank at once, each on its own thread.
inline void together(const std::vector<std::function<void()>>& bodies) {
  std::vector<std::thread> threads;
  for (const auto& body : bodies) threads.emplace_back(body);
  for (auto& thread : threads) thread.join();
}

inline void expect_connected(Rank& rank, std::set<int> others) {
  CHECK(rank.memory.attached() == others);
  const auto members = rank.group->members();
  CHECK(std::set<int>(members.begin(), members.end()) == others);
}

inline bool mentions(const Error& error, const std::string& text) {
  if (error.reason.find(text) != std::string::npos) return true;
  std::fprintf(stderr, "'%s' is not in: %s\n", text.c_str(), error.reason.c_str());
  return false;
}

}  // namespace nixl::core::ep::test
