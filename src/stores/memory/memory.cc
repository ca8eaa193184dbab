#include "stores/memory/memory.h"

namespace nixl::core {
namespace {

class SharedStore final : public Store {
 public:
  explicit SharedStore(std::shared_ptr<MemoryStore> content) : content_(std::move(content)) {}
  Result<void> publish(std::string_view key, std::string_view value) override { return content_->publish(key, value); }
  Result<std::string> fetch(std::string_view key, Deadline deadline) override { return content_->fetch(key, deadline); }
  Result<void> withdraw(std::string_view key) override { return content_->withdraw(key); }

 private:
  std::shared_ptr<MemoryStore> content_;
};

Result<std::unique_ptr<Store>> open_memory(StoreConfig config) {
  static std::mutex mutex;
  static std::map<std::string, std::weak_ptr<MemoryStore>> all;
  const std::lock_guard lock(mutex);
  std::weak_ptr<MemoryStore>& entry = all[config.endpoint];
  std::shared_ptr<MemoryStore> content = entry.lock();
  if (!content) entry = content = std::make_shared<MemoryStore>();
  return std::make_unique<SharedStore>(std::move(content));
}

}  // namespace

Result<void> MemoryStore::publish(std::string_view key, std::string_view value) {
  {
    const std::lock_guard lock(mutex_);
    values_.insert_or_assign(std::string(key), std::string(value));
  }
  changed_.notify_all();
  return {};
}

Result<std::string> MemoryStore::fetch(std::string_view key, Deadline deadline) {
  std::unique_lock lock(mutex_);
  for (;;) {
    if (const auto found = values_.find(key); found != values_.end()) return found->second;
    if (deadline.passed())
      return fail(Code::kTimeout, "key '%.*s' is not in the in-process store", int(key.size()), key.data());
    if (deadline.at() == Deadline::never().at())
      changed_.wait(lock);
    else
      changed_.wait_for(lock, std::chrono::nanoseconds(deadline.left()));
  }
}

Result<void> MemoryStore::withdraw(std::string_view key) {
  const std::lock_guard lock(mutex_);
  if (const auto found = values_.find(key); found != values_.end()) values_.erase(found);
  return {};
}

std::size_t MemoryStore::size() const {
  const std::lock_guard lock(mutex_);
  return values_.size();
}

const StoreEntry& store_memory() {
  static const StoreEntry entry{"memory", open_memory};
  return entry;
}

}  // namespace nixl::core
