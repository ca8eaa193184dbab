// A store inside the process: for ranks or agents that are threads, and for tests.
#pragma once
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>

#include "contract/entry.h"

namespace nixl::core {

class MemoryStore final : public Store {
 public:
  Result<void> publish(std::string_view key, std::string_view value) override;
  Result<std::string> fetch(std::string_view key, Deadline deadline) override;
  Result<void> withdraw(std::string_view key) override;

  std::size_t size() const;  // number of keys

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string, std::less<>> values_;
};

// Stores opened with the same endpoint text share one content for as long as any of them lives.
const StoreEntry& store_memory();

}  // namespace nixl::core
