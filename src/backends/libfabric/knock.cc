#include "backends/libfabric/knock.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace nixl::core::libfabric {

void Knock::start(const std::string& address) {
  if (socket_ || !next_.passed()) return;
  next_ = Deadline::after(1'000'000'000);
  sockaddr_storage there{};
  const std::size_t size = std::min(address.size(), sizeof there);
  std::memcpy(&there, address.data(), size);
  Fd socket(::socket(there.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return;
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&there), static_cast<socklen_t>(size)) == 0 ||
      errno == EINPROGRESS || errno == ECONNREFUSED)
    socket_ = std::move(socket);
}

bool Knock::refused() noexcept {
  pollfd wait{socket_.get(), POLLOUT, 0};
  if (!socket_ || ::poll(&wait, 1, 0) <= 0) return false;
  int error = 0;
  socklen_t size = sizeof error;
  const bool known = ::getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &error, &size) == 0;
  socket_.reset();
  return known && error == ECONNREFUSED;
}

}  // namespace nixl::core::libfabric
