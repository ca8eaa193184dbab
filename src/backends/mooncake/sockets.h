// What the kernel is to watch for on the sockets between Mooncake backends.
#pragma once
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>

namespace nixl::core::mooncake {

// A host that is gone ends the connection after about 20 s. One that is only stopped answers the kernel's questions and stays, unless
// it owes us room for so long.
inline void watch_over(int fd) {
  const int on = 1, idle_s = 5, every_s = 5, times = 3, patience_ms = 20'000;
  ::setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &on, sizeof on);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every_s, sizeof every_s);
  ::setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof times);
  ::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience_ms, sizeof patience_ms);
}

// Closed by the other end, or broken; does not wait and takes nothing out.
inline bool is_over(int fd) {
  char byte;
  const auto got = ::recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  return got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR);
}

}  // namespace nixl::core::mooncake
