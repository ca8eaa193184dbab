// Store: a key-value rendezvous for metadata and membership. Keys and values are any bytes; keys are whole (callers prepend
// their own namespace). Every function may be called from any threads.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/result.h"

namespace nixl::core {

struct StoreEvent {
  enum class Kind { kPut, kDelete } kind = Kind::kPut;
  std::string key;
  std::string value;  // kPut only
};

// Destroying it ends the watch; no callback runs after the destructor has returned.
class StoreWatch {
 public:
  virtual ~StoreWatch() = default;
};

// Optional ability: being told of changes. Callbacks run on a thread of the store, must not block, and may not destroy their
// own watch. After a lost connection the watch resumes by itself; a key that vanished meanwhile is reported as deleted.
class StoreWatcher {
 public:
  virtual ~StoreWatcher() = default;
  virtual Result<std::unique_ptr<StoreWatch>> watch(std::string_view prefix,
                                                    std::function<void(const StoreEvent&)> callback) = 0;
};

class Store {
 public:
  virtual ~Store() = default;
  // Sets the key, replacing an old value. Blocks for at most StoreConfig::timeout_ns; then kTimeout naming the endpoint.
  virtual Result<void> publish(std::string_view key, std::string_view value) = 0;
  // Waits until the key exists and returns its value; kTimeout naming the key when the deadline passes. A deadline already
  // passed asks once. Unreachable store: kIo with endpoint and cause, not later than the deadline.
  virtual Result<std::string> fetch(std::string_view key, Deadline deadline) = 0;
  // Removes the key; a missing key is success.
  virtual Result<void> withdraw(std::string_view key) = 0;
  // Removes every key that begins so, whoever published it; stores that cannot say kUnsupported.
  virtual Result<void> withdraw_prefix(std::string_view) {
    return fail(Code::kUnsupported, "this store removes single keys only");
  }
  virtual StoreWatcher* watcher() noexcept { return nullptr; }
};

struct StoreConfig {
  std::string endpoint;                    // "host:port" or a URL, as the store understands it
  Nanoseconds timeout_ns = 5'000'000'000;  // of one operation
  Nanoseconds connect_timeout_ns = 5'000'000'000;
  Nanoseconds lease_ns = 0;  // > 0: published keys vanish this long after the publisher died (stores that can)
};

}  // namespace nixl::core
