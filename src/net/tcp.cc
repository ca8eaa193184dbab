#include "net/tcp.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <cerrno>
#include <memory>

#include "base/env.h"
#include "net/wait.h"

namespace nixl::core::net {
namespace {

struct FreeAddresses {
  void operator()(addrinfo* list) const noexcept { ::freeaddrinfo(list); }
};
using Addresses = std::unique_ptr<addrinfo, FreeAddresses>;

Result<Addresses> resolve(const Endpoint& endpoint, int flags) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* list = nullptr;
  const char* host = endpoint.host.empty() ? nullptr : endpoint.host.c_str();
  const int code = ::getaddrinfo(host, std::to_string(endpoint.port).c_str(), &hints, &list);
  if (code != 0) return fail(Code::kNotFound, "address of %s: %s", to_text(endpoint).c_str(), ::gai_strerror(code));
  return Addresses(list);
}

Result<Fd> tcp_socket(const addrinfo& address) {
  Fd fd(::socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return fail(errno_error("socket(TCP)", errno));
  const int on = 1;
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
  return fd;
}

Result<Fd> listen_at(const addrinfo& address, const std::string& name) {
  NIXL_ASSIGN(Fd fd, tcp_socket(address));
  const int on = 1, off = 0;
  ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  if (address.ai_family == AF_INET6) ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof(off));
  if (::bind(fd.get(), address.ai_addr, address.ai_addrlen) != 0) return fail(errno_error("bind to " + name, errno));
  if (::listen(fd.get(), SOMAXCONN) != 0) return fail(errno_error("listen on " + name, errno));
  return fd;
}

Result<Fd> connect_to(const addrinfo& address, const std::string& name, Deadline deadline) {
  NIXL_ASSIGN(Fd fd, tcp_socket(address));
  if (::connect(fd.get(), address.ai_addr, address.ai_addrlen) != 0) {
    if (errno != EINPROGRESS) return fail(errno_error("connect to " + name, errno, Code::kPeerLost));
    NIXL_TRY(wait_for(fd.get(), POLLOUT, deadline, "a connection to " + name));
    int error = 0;
    socklen_t size = sizeof(error);
    ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return fail(errno_error("connect to " + name, error, Code::kPeerLost));
  }
  return fd;
}

// Tries `attempt` on each address; the error is that of the last one.
template <typename Attempt>
Result<Fd> first_of(const addrinfo* list, Attempt attempt) {
  Result<Fd> last = fail(Code::kNotFound, "the name has no address");
  for (const addrinfo* address = list; address; address = address->ai_next) {
    last = attempt(*address);
    if (last) return last;
  }
  return last;
}

}  // namespace

Result<Endpoint> parse_endpoint(std::string_view text) {
  const std::size_t colon = text.rfind(':');
  const auto port = colon == std::string_view::npos ? std::nullopt : parse_int(text.substr(colon + 1));
  std::string_view host = text.substr(0, colon == std::string_view::npos ? 0 : colon);
  const bool bracketed = host.size() > 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  if (!port || *port < 0 || *port > 65535 || (!bracketed && host.find(':') != std::string_view::npos))
    return fail(Code::kInvalidArgument,
                "endpoint '%.*s': expected host:port, 1.2.3.4:port or [IPv6]:port, port 0 to 65535", int(text.size()),
                text.data());
  return Endpoint{std::string(host), static_cast<std::uint16_t>(*port)};
}

std::string to_text(const Endpoint& endpoint) {
  const bool v6 = endpoint.host.find(':') != std::string::npos;
  return (v6 ? "[" + endpoint.host + "]" : endpoint.host) + ":" + std::to_string(endpoint.port);
}

Result<Fd> listen_tcp(const Endpoint& endpoint) {
  NIXL_ASSIGN(const Addresses list, resolve(endpoint, AI_PASSIVE));
  // Without a host, one IPv6 socket serves both families; machines without IPv6 fall through to IPv4.
  const std::string name = to_text(endpoint);
  if (endpoint.host.empty())
    for (const addrinfo* address = list.get(); address; address = address->ai_next)
      if (address->ai_family == AF_INET6)
        if (Result<Fd> both = listen_at(*address, name)) return both;
  return first_of(list.get(), [&](const addrinfo& address) { return listen_at(address, name); });
}

Result<Endpoint> local_endpoint(int fd) {
  sockaddr_storage storage{};
  socklen_t size = sizeof(storage);
  if (::getsockname(fd, reinterpret_cast<sockaddr*>(&storage), &size) != 0)
    return fail(errno_error("getsockname", errno));
  char host[INET6_ADDRSTRLEN] = "";
  if (storage.ss_family == AF_INET6) {
    const auto& address = reinterpret_cast<const sockaddr_in6&>(storage);
    ::inet_ntop(AF_INET6, &address.sin6_addr, host, sizeof(host));
    return Endpoint{host, ntohs(address.sin6_port)};
  }
  const auto& address = reinterpret_cast<const sockaddr_in&>(storage);
  ::inet_ntop(AF_INET, &address.sin_addr, host, sizeof(host));
  return Endpoint{host, ntohs(address.sin_port)};
}

Result<Fd> connect_tcp(const Endpoint& endpoint, Deadline deadline) {
  NIXL_ASSIGN(const Addresses list, resolve(endpoint, 0));
  const std::string name = to_text(endpoint);
  return first_of(list.get(), [&](const addrinfo& address) { return connect_to(address, name, deadline); });
}

}  // namespace nixl::core::net
