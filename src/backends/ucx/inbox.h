// Notifications that arrived, put back into the order of their senders. Thread-safe.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "contract/backend.h"

namespace nixl::core::ucx {

class Inbox {
 public:
  // A message of a stream of one sender. Repeated ones are dropped, early ones held back until those before have come.
  void add(std::uint64_t incarnation, std::uint64_t stream, std::uint64_t sequence, Notification notification);
  // The first sequence number of the stream that has not arrived.
  std::uint64_t next_sequence(std::uint64_t incarnation, std::uint64_t stream);
  void drain(std::vector<Notification>& out);

 private:
  struct Stream {
    std::uint64_t next = 0;
    std::map<std::uint64_t, Notification> early;
  };
  std::mutex mutex_;
  std::map<std::pair<std::uint64_t, std::uint64_t>, Stream> streams_;
  std::vector<Notification> ready_;
};

}  // namespace nixl::core::ucx
