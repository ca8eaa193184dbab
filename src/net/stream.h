// Bytes over a connected non-blocking stream socket, for protocols with a framing of their own.
#pragma once
#include <string>
#include <string_view>

#include "base/clock.h"
#include "base/fd.h"
#include "base/result.h"

namespace nixl::core::net {

// Blocks until the kernel took everything. kPeerLost: the other end is closed; kTimeout.
Result<void> send_all(int fd, std::string_view bytes, Deadline deadline);

// Appends what has arrived, without blocking; false: nothing has. kPeerLost: closed by the other end.
Result<bool> receive_available(int fd, std::string& input);

// Waits until `input` holds at least `size` bytes.
Result<void> receive_until(int fd, std::string& input, std::size_t size, Deadline deadline);

}  // namespace nixl::core::net
