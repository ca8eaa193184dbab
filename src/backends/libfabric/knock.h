// Whether anybody listens at the TCP port that an address of the providers over TCP is. They repeat an attempt to connect
// without a word when it is refused; the kernel of the peer's host says at once that the process has ended.
#pragma once
#include <string>

#include "base/fd.h"

namespace nixl::core::libfabric {

class Knock {
 public:
  // Starts; never blocks. One that is under way goes on.
  void start(const std::string& address);
  bool under_way() const noexcept { return static_cast<bool>(socket_); }
  // True: refused. Ends it where there is an answer.
  bool refused() noexcept;

 private:
  Fd socket_;
};

}  // namespace nixl::core::libfabric
