// Channel: whole messages over one stream socket, local or TCP. A local channel also passes file descriptors beside a
// message.
//
// On the wire: u32 length of the message, u16 number of descriptors, u16 kFrameMark; then the bytes. A length above the
// receiver's limit, a wrong mark or more descriptors than allowed end the conversation before anything is allocated.
// One thread at a time sends, one receives.
#pragma once
#include <cstdint>
#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/clock.h"
#include "base/fd.h"
#include "base/fork.h"
#include "base/result.h"

namespace nixl::core::net {

inline constexpr std::uint16_t kFrameMark = 0x4e58;
inline constexpr std::size_t kMaxFrameDescriptors = 64;

struct Message {
  std::string bytes;
  std::vector<Fd> descriptors;
};

class Channel {
 public:
  // Takes a connected non-blocking socket. Messages longer than `max_bytes` are refused on receipt.
  // A child that is forked later does not hold the connection open, and must leave its copy of this object alone.
  Channel(Fd socket, std::size_t max_bytes)
      : socket_(std::move(socket)), closed_in_children_(socket_.get()), max_bytes_(max_bytes) {}

  // Blocks until the kernel took everything. kPeerLost: the other end is closed; kTimeout.
  Result<void> send(std::string_view bytes, std::span<const int> descriptors, Deadline deadline);
  Result<void> send(std::string_view bytes, Deadline deadline) { return send(bytes, {}, deadline); }

  // The next message. kPeerLost: closed by the other end; kTimeout; kMismatch: not a frame of ours.
  Result<Message> receive(Deadline deadline);
  // Takes what has arrived without blocking; nullopt while the message is incomplete.
  Result<std::optional<Message>> try_receive();

  int fd() const noexcept { return socket_.get(); }
  explicit operator bool() const noexcept { return static_cast<bool>(socket_); }

 private:
  Result<bool> read_some();  // false: nothing has arrived
  Result<std::optional<Message>> take_complete();

  Fd socket_;
  ClosedInChildren closed_in_children_;
  std::size_t max_bytes_;
  std::string input_;
  std::size_t input_at_ = 0;  // bytes of input_ already handed out
  std::deque<Fd> descriptors_;
};

}  // namespace nixl::core::net
