#include "net/local.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

#include "net/wait.h"

namespace nixl::core::net {
namespace {

constexpr Nanoseconds kRetry_ns = 1'000'000;

struct Address {
  sockaddr_un value{};
  socklen_t size = 0;
};

Result<Address> abstract_address(std::string_view name) {
  if (name.empty() || name.size() > kMaxLocalName)
    return fail(Code::kInvalidArgument, "local socket name of %zu bytes; 1 to %zu are possible", name.size(),
                kMaxLocalName);
  Address address;
  address.value.sun_family = AF_UNIX;
  std::memcpy(address.value.sun_path + 1, name.data(), name.size());  // a leading NUL makes it abstract
  address.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
  return address;
}

Result<Fd> local_socket() {
  Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return fail(errno_error("socket(AF_UNIX)", errno));
  return fd;
}

std::string printable(std::string_view name) {
  return "local socket @" + std::string(name);
}

}  // namespace

Result<Fd> listen_local(std::string_view name) {
  NIXL_ASSIGN(const Address address, abstract_address(name));
  NIXL_ASSIGN(Fd fd, local_socket());
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address.value), address.size) != 0)
    return fail(errno_error("bind of " + printable(name), errno));
  if (::listen(fd.get(), SOMAXCONN) != 0) return fail(errno_error("listen on " + printable(name), errno));
  return fd;
}

Result<Fd> connect_local(std::string_view name, Deadline deadline) {
  NIXL_ASSIGN(const Address address, abstract_address(name));
  for (;;) {
    NIXL_ASSIGN(Fd fd, local_socket());
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address.value), address.size) == 0) return fd;
    const int error = errno;
    if (error == ECONNREFUSED) return fail(errno_error("connect to " + printable(name), error, Code::kPeerLost));
    // A full queue of a listener answers EAGAIN at once and cannot be polled for.
    if (error != EAGAIN && error != EINTR) return fail(errno_error("connect to " + printable(name), error));
    if (deadline.passed()) return fail(Code::kTimeout, "connect to %s: its queue is full", printable(name).c_str());
    NIXL_TRY(wait_any({}, deadline.earlier(Deadline::after(kRetry_ns))));
  }
}

Result<Fd> accept_connection(int listener) {
  for (;;) {
    Fd fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (fd) return fd;
    if (errno == EINTR || errno == ECONNABORTED) continue;
    if (errno == EAGAIN) return fail(Code::kAgain, "nobody is waiting to be accepted");
    return fail(errno_error("accept", errno));
  }
}

Result<Credentials> peer_credentials(int fd) {
  ucred who{};
  socklen_t size = sizeof(who);
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &size) != 0)
    return fail(errno_error("getsockopt(SO_PEERCRED)", errno));
  return Credentials{who.pid, who.uid};
}

Result<Place> this_place() {
  constexpr const char* kBootId = "/proc/sys/kernel/random/boot_id";
  Fd file(::open(kBootId, O_RDONLY | O_CLOEXEC));
  if (!file) return fail(errno_error(std::string("open ") + kBootId, errno));
  char text[64];
  const ssize_t size = ::read(file.get(), text, sizeof(text));
  if (size <= 0) return fail(errno_error(std::string("read ") + kBootId, size < 0 ? errno : EIO));
  Place place;
  place.boot_id.assign(text, static_cast<std::size_t>(size));
  while (!place.boot_id.empty() && place.boot_id.back() == '\n') place.boot_id.pop_back();
  struct stat about {};
  if (::stat("/proc/self/ns/net", &about) != 0) return fail(errno_error("stat /proc/self/ns/net", errno));
  place.network_namespace = std::to_string(about.st_dev) + ":" + std::to_string(about.st_ino);
  return place;
}

}  // namespace nixl::core::net
