#include "backends/ucx/inbox.h"

#include <iterator>

namespace nixl::core::ucx {

void Inbox::add(std::uint64_t incarnation, std::uint64_t stream_id, std::uint64_t sequence, Notification notification) {
  const std::lock_guard guard(mutex_);
  Stream& stream = streams_[{incarnation, stream_id}];
  if (sequence < stream.next) return;
  if (sequence > stream.next) {
    stream.early.emplace(sequence, std::move(notification));
    return;
  }
  ready_.push_back(std::move(notification));
  ++stream.next;
  for (auto early = stream.early.begin(); early != stream.early.end() && early->first == stream.next;
       early = stream.early.erase(early)) {
    ready_.push_back(std::move(early->second));
    ++stream.next;
  }
}

std::uint64_t Inbox::next_sequence(std::uint64_t incarnation, std::uint64_t stream) {
  const std::lock_guard guard(mutex_);
  const auto found = streams_.find({incarnation, stream});
  return found == streams_.end() ? 0 : found->second.next;
}

void Inbox::drain(std::vector<Notification>& out) {
  const std::lock_guard guard(mutex_);
  if (out.empty())
    out.swap(ready_);
  else
    out.insert(out.end(), std::make_move_iterator(ready_.begin()), std::make_move_iterator(ready_.end()));
  ready_.clear();
}

}  // namespace nixl::core::ucx
