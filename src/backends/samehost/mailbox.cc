#include "backends/samehost/mailbox.h"

#include <array>
#include <cerrno>
#include <cstring>
#include <iterator>

#include "backends/samehost/callers_events.h"

namespace nixl::core::samehost {

Doorbell Doorbell::named(const std::string& name) noexcept {
  Doorbell bell;
  bell.address.sun_family = AF_UNIX;
  const std::size_t length = std::min(name.size(), sizeof bell.address.sun_path - 1);
  std::memcpy(bell.address.sun_path + 1, name.data(), length);  // a leading zero byte makes it abstract
  bell.bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + length);
  return bell;
}

Result<std::shared_ptr<Mailbox>> Mailbox::open(std::uint64_t incarnation, const std::string& own_name) {
  NIXL_ASSIGN(Segment segment, Segment::create(incarnation));
  std::shared_ptr<Mailbox> box(new Mailbox(std::move(segment), own_name));
  box->socket_ = Fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!box->socket_) return fail(errno_error("socket of the same-host doorbell", errno));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  socklen_t bytes = sizeof(sa_family_t);  // the family alone: the kernel picks a free abstract name
  if (::bind(box->socket(), reinterpret_cast<sockaddr*>(&address), bytes) != 0)
    return fail(errno_error("bind the same-host doorbell", errno));
  bytes = sizeof address;
  if (::getsockname(box->socket(), reinterpret_cast<sockaddr*>(&address), &bytes) != 0)
    return fail(errno_error("name of the same-host doorbell", errno));
  box->name_.assign(address.sun_path + 1, bytes - offsetof(sockaddr_un, sun_path) - 1);
  box->own_ = Doorbell::named(box->name_);
  return box;
}

void Mailbox::ring(Segment& segment, const Doorbell& doorbell) noexcept {
  auto& armed = segment.header().armed;
  if (armed.load(std::memory_order_seq_cst) == 0 || armed.exchange(0, std::memory_order_seq_cst) == 0) return;
  // A full queue means that it was rung already; a refused one that the owner is gone, which is found out elsewhere.
  const char byte = 0;
  (void)::sendto(socket_.get(), &byte, 1, MSG_DONTWAIT | MSG_NOSIGNAL,
                 reinterpret_cast<const sockaddr*>(&doorbell.address), doorbell.bytes);
}

bool Mailbox::arm() noexcept {
  segment_.header().armed.store(1, std::memory_order_seq_cst);
  if (!reader_.has_news()) return true;
  segment_.header().armed.store(0, std::memory_order_seq_cst);
  return false;
}

void Mailbox::silence() noexcept {
  std::array<char, 8> bytes;
  while (::recv(socket_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT) > 0) {
  }
}

void Mailbox::share_callers_event(int eventfd) noexcept {
  const std::uint64_t word = callers_event_word(eventfd);
  SegmentHeader& header = segment_.header();
  std::lock_guard lock(mutex_);
  for (const auto& shared : header.callers_events)
    if (word != 0 && shared.load(std::memory_order_relaxed) == word) return;
  // One that cannot be shared would be left asleep by those that are: then the owner's own thread tells all of them.
  if (word == 0) num_callers_events_ = kMaxCallersEvents;
  if (num_callers_events_ < kMaxCallersEvents)
    header.callers_events[num_callers_events_].store(word, std::memory_order_seq_cst);
  ++num_callers_events_;
  if (num_callers_events_ > kMaxCallersEvents) header.callers_armed.store(0, std::memory_order_seq_cst);
  arm_callers();
}

void Mailbox::arm_callers() noexcept {
  if (num_callers_events_ == 0 || num_callers_events_ > kMaxCallersEvents) return;
  segment_.header().callers_armed.store(1, std::memory_order_seq_cst);
}

bool Mailbox::collect() {
  if (!reader_.has_news()) return false;
  std::lock_guard lock(mutex_);
  return collect_locked();
}

bool Mailbox::collect_locked() {
  const bool any = reader_.collect(arrived_);
  if (reader_.has_offers()) has_offers_.store(true, std::memory_order_release);
  return any;
}

std::vector<std::string> Mailbox::take_offers() {
  std::lock_guard lock(mutex_);
  has_offers_.store(false, std::memory_order_relaxed);
  return reader_.take_offers();
}

void Mailbox::drain(std::vector<Notification>& out) {
  std::lock_guard lock(mutex_);
  arm_callers();
  if (reader_.has_news()) collect_locked();
  out.insert(out.end(), std::make_move_iterator(arrived_.begin()), std::make_move_iterator(arrived_.end()));
  arrived_.clear();
}

}  // namespace nixl::core::samehost
