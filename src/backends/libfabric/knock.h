// Whether anybody listens at the TCP port that an address of the providers over TCP is. They repeat an attempt to connect
// without a word when it is refused; the kernel of the peer's host says at once that the process has ended.
#pragma once
#include <string>

#include "base/clock.h"
#include "base/fd.h"

namespace nixl::core::libfabric {

class Knock {
 public:
  // Starts, once a second at most; never blocks.
  void start(const std::string& address);
  bool under_way() const noexcept { return static_cast<bool>(socket_); }
  // True: refused. Ends it where there is an answer.
  bool refused() noexcept;

 private:
  Fd socket_;
  Deadline next_ = Deadline::passed_already();
};

}  // namespace nixl::core::libfabric
