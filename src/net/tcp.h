// TCP over IPv4 and IPv6. All sockets are non-blocking, closed on exec, and send small frames at once.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::net {

struct Endpoint {
  std::string host;  // name or address; empty when listening: every interface
  std::uint16_t port = 0;
};

// "host:port", "1.2.3.4:80", "[::1]:80"; a bare IPv6 address needs the brackets.
Result<Endpoint> parse_endpoint(std::string_view text);
std::string to_text(const Endpoint& endpoint);

// Port 0 takes a free one; local_endpoint() tells which.
Result<Fd> listen_tcp(const Endpoint& endpoint);
Result<Endpoint> local_endpoint(int fd);
// Tries every address of the host until the deadline. kPeerLost: all refused; kTimeout; kNotFound: the name is unknown.
Result<Fd> connect_tcp(const Endpoint& endpoint, Deadline deadline);

}  // namespace nixl::core::net
