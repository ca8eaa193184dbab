#include "net/channel.h"

#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/bytes.h"
#include "net/wait.h"

namespace nixl::core::net {
namespace {

constexpr std::size_t kHeaderBytes = 8;
constexpr std::size_t kReadBytes = 64 * 1024;

bool closed_by_peer(int error) {
  return error == EPIPE || error == ECONNRESET || error == ENOTCONN;
}

// The descriptors travel with the first bytes of a frame.
struct Control {
  alignas(cmsghdr) char bytes[CMSG_SPACE(kMaxFrameDescriptors * sizeof(int))];
};

void attach_descriptors(msghdr& message, Control& control, std::span<const int> descriptors) {
  if (descriptors.empty()) return;
  message.msg_control = control.bytes;
  message.msg_controllen = CMSG_SPACE(descriptors.size_bytes());
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(descriptors.size_bytes());
  std::memcpy(CMSG_DATA(header), descriptors.data(), descriptors.size_bytes());
}

void take_descriptors(msghdr& message, std::deque<Fd>& out) {
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header; header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int value;
      std::memcpy(&value, CMSG_DATA(header) + i * sizeof(int), sizeof(int));
      out.emplace_back(value);
    }
  }
}

}  // namespace

Result<void> Channel::send(std::string_view bytes, std::span<const int> descriptors, Deadline deadline) {
  if (bytes.size() > UINT32_MAX || descriptors.size() > kMaxFrameDescriptors)
    return fail(Code::kInvalidArgument, "message of %zu bytes and %zu descriptors; at most %u and %zu are possible",
                bytes.size(), descriptors.size(), UINT32_MAX, kMaxFrameDescriptors);
  ByteWriter header;
  header.put_all(static_cast<std::uint32_t>(bytes.size()), static_cast<std::uint16_t>(descriptors.size()), kFrameMark);
  std::size_t sent = 0;
  const std::size_t total = kHeaderBytes + bytes.size();
  Control control;
  while (sent < total) {
    iovec parts[2];
    int count = 0;
    if (sent < kHeaderBytes) parts[count++] = {const_cast<char*>(header.bytes().data()) + sent, kHeaderBytes - sent};
    const std::size_t body = sent > kHeaderBytes ? sent - kHeaderBytes : 0;
    if (body < bytes.size()) parts[count++] = {const_cast<char*>(bytes.data()) + body, bytes.size() - body};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = static_cast<std::size_t>(count);
    if (sent == 0) attach_descriptors(message, control, descriptors);
    const ssize_t done = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL);
    if (done > 0) {
      sent += static_cast<std::size_t>(done);
    } else if (errno == EAGAIN) {
      NIXL_TRY(wait_for(socket_.get(), POLLOUT, deadline, "room to send"));
    } else if (errno != EINTR) {
      return fail(errno_error("send", errno, closed_by_peer(errno) ? Code::kPeerLost : Code::kIo));
    }
  }
  return {};
}

Result<bool> Channel::read_some() {
  input_.erase(0, input_at_);
  input_at_ = 0;
  const std::size_t old = input_.size();
  input_.resize(old + kReadBytes);
  iovec part{input_.data() + old, kReadBytes};
  Control control;
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.bytes;
  message.msg_controllen = sizeof(control.bytes);
  ssize_t got;
  do got = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
  while (got < 0 && errno == EINTR);
  const int error = errno;
  input_.resize(old + static_cast<std::size_t>(std::max<ssize_t>(got, 0)));
  if (got > 0) {
    take_descriptors(message, descriptors_);
    if (message.msg_flags & MSG_CTRUNC)
      return fail(Code::kMismatch,
                  "descriptors beside a message were cut off: more than %zu, or this process has none left "
                  "(ulimit -n)",
                  kMaxFrameDescriptors);
    return true;
  }
  if (got == 0) return fail(Code::kPeerLost, "the connection was closed by the other end");
  if (error == EAGAIN) return false;
  return fail(errno_error("receive", error, closed_by_peer(error) ? Code::kPeerLost : Code::kIo));
}

Result<std::optional<Message>> Channel::take_complete() {
  ByteReader reader(std::string_view(input_).substr(input_at_));
  if (reader.left() < kHeaderBytes) return std::nullopt;
  const auto size = *reader.get<std::uint32_t>();
  const auto num_descriptors = *reader.get<std::uint16_t>();
  const auto mark = *reader.get<std::uint16_t>();
  if (mark != kFrameMark) return fail(Code::kMismatch, "not a frame: mark %#x instead of %#x", mark, kFrameMark);
  if (size > max_bytes_ || num_descriptors > kMaxFrameDescriptors)
    return fail(Code::kMismatch, "frame of %u bytes and %u descriptors; at most %zu and %zu are accepted", size,
                num_descriptors, max_bytes_, kMaxFrameDescriptors);
  if (reader.left() < size) return std::nullopt;
  if (descriptors_.size() < num_descriptors)
    return fail(Code::kMismatch, "%zu descriptors arrived of %u announced", descriptors_.size(), num_descriptors);
  Message message;
  message.bytes = *reader.get_raw(size);
  for (std::uint16_t i = 0; i < num_descriptors; ++i) {
    message.descriptors.push_back(std::move(descriptors_.front()));
    descriptors_.pop_front();
  }
  input_at_ += kHeaderBytes + size;
  return message;
}

Result<std::optional<Message>> Channel::try_receive() {
  for (;;) {
    NIXL_ASSIGN(std::optional<Message> message, take_complete());
    if (message) return message;
    NIXL_ASSIGN(const bool more, read_some());
    if (!more) return std::nullopt;
  }
}

Result<Message> Channel::receive(Deadline deadline) {
  for (;;) {
    NIXL_ASSIGN(std::optional<Message> message, try_receive());
    if (message) return std::move(*message);
    NIXL_TRY(wait_for(socket_.get(), POLLIN, deadline, "a message"));
  }
}

}  // namespace nixl::core::net
