#include "net/stream.h"

#include <sys/socket.h>

#include <cerrno>

#include "net/wait.h"

namespace nixl::core::net {
namespace {

constexpr std::size_t kReadBytes = 64 * 1024;

Error socket_error(const char* what, int error) {
  const bool lost = error == EPIPE || error == ECONNRESET || error == ENOTCONN;
  return errno_error(what, error, lost ? Code::kPeerLost : Code::kIo);
}

}  // namespace

Result<void> send_all(int fd, std::string_view bytes, Deadline deadline) {
  while (!bytes.empty()) {
    const ssize_t done = ::send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (done > 0)
      bytes.remove_prefix(static_cast<std::size_t>(done));
    else if (errno == EAGAIN)
      NIXL_TRY(wait_for(fd, POLLOUT, deadline, "room to send"));
    else if (errno != EINTR)
      return fail(socket_error("send", errno));
  }
  return {};
}

Result<bool> receive_available(int fd, std::string& input) {
  const std::size_t old = input.size();
  input.resize(old + kReadBytes);
  ssize_t got;
  do got = ::recv(fd, input.data() + old, kReadBytes, 0);
  while (got < 0 && errno == EINTR);
  const int error = errno;
  input.resize(old + static_cast<std::size_t>(got > 0 ? got : 0));
  if (got > 0) return true;
  if (got == 0) return fail(Code::kPeerLost, "the connection was closed by the other end");
  if (error == EAGAIN) return false;
  return fail(socket_error("receive", error));
}

Result<void> receive_until(int fd, std::string& input, std::size_t size, Deadline deadline) {
  while (input.size() < size) {
    NIXL_ASSIGN(const bool more, receive_available(fd, input));
    if (!more) NIXL_TRY(wait_for(fd, POLLIN, deadline, "an answer"));
  }
  return {};
}

}  // namespace nixl::core::net
