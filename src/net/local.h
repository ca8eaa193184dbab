// Sockets between processes of one host. Names are abstract: they exist in a network namespace as long as a socket is
// bound to them and vanish with its process, so no death leaves anything in the file system.
#pragma once
#include <sys/types.h>

#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::net {

inline constexpr std::size_t kMaxLocalName = 100;

// All sockets are non-blocking and closed on exec.
Result<Fd> listen_local(std::string_view name);
// kPeerLost when nobody in this network namespace listens on the name; kTimeout when its queue stays full.
Result<Fd> connect_local(std::string_view name, Deadline deadline);
// kAgain when nobody is waiting.
Result<Fd> accept_connection(int listener);

// Who is at the other end, as the kernel recorded it when the connection was made.
struct Credentials {
  pid_t pid = 0;
  uid_t uid = 0;
};
Result<Credentials> peer_credentials(int fd);

// Where descriptors can be passed: the same boot of the same kernel, and the same network namespace.
struct Place {
  std::string boot_id;
  std::string network_namespace;
};
Result<Place> this_place();

}  // namespace nixl::core::net
