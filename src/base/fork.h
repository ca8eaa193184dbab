// What fork() does to an object with threads, sockets or shared memory: the child has a copy of it without the threads, and what
// the copy writes to shared memory or says on a socket its parent answers for. So such an object notes where it was made, does
// nothing in a child, and leaves its parts alone there instead of destroying them.
#pragma once
#include <utility>

namespace nixl::core {

class Birthplace {
 public:
  Birthplace() noexcept : forks_(forks()) {}
  bool is_elsewhere() const noexcept { return forks_ != forks(); }  // in a child of the process that made this

 private:
  static int forks() noexcept;
  int forks_;
};

// Closes a descriptor in the children of forks from now on, until this object goes: the other end of a socket would otherwise wait
// for the last child to end before it hears of the parent's death. The child must not touch whoever owns the descriptor. Move-only.
class ClosedInChildren {
 public:
  ClosedInChildren() = default;
  explicit ClosedInChildren(int fd);  // fd < 0: nothing
  ClosedInChildren(ClosedInChildren&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ClosedInChildren& operator=(ClosedInChildren&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~ClosedInChildren();

 private:
  int fd_ = -1;
};

}  // namespace nixl::core
