#include "base/fd.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

namespace nixl::core {

void Fd::reset(int value) noexcept {
  if (value_ >= 0) ::close(value_);
  value_ = value;
}

Result<Fd> Fd::duplicate() const {
  const int copy = ::fcntl(value_, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return fail(errno_error("duplicate of file descriptor " + std::to_string(value_), errno));
  return Fd(copy);
}

}  // namespace nixl::core
