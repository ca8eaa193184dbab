// preadv2 and pwritev2 until the kernel has answered something other than "interrupted". Internal to fileio.
#pragma once
#include <sys/uio.h>

#include <cerrno>

#include "fileio/queue.h"

namespace nixl::core::fileio {

inline std::int64_t plain_call(const Io& io, int flags) {
  const auto offset = static_cast<off_t>(io.offset);
  const int count = static_cast<int>(io.num_iov);
  for (;;) {
    const ssize_t got =
        io.write ? ::pwritev2(io.fd, io.iov, count, offset, flags) : ::preadv2(io.fd, io.iov, count, offset, flags);
    if (got >= 0) return got;
    if (errno != EINTR) return -errno;
  }
}

}  // namespace nixl::core::fileio
