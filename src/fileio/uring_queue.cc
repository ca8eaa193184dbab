// The io_uring queue. One ring, no kernel polling thread (it would burn a core while idle).
#include <liburing.h>
#include <unistd.h>

#include <cerrno>

#include "fileio/queue.h"

namespace nixl::core::fileio {
namespace {

constexpr std::uint64_t kCancelTag = UINT64_MAX;  // completions of cancel requests themselves: dropped

class UringQueue final : public Queue {
 public:
  UringQueue(const io_uring& ring, std::uint32_t depth) : ring_(ring), depth_(depth), owner_(::getpid()) {}
  ~UringQueue() override {
    if (::getpid() != owner_) {  // after a fork the ring is not mapped here
      ::close(ring_.ring_fd);
      return;
    }
    Done done[32];
    while (in_flight_ > 0)
      if (reap(done) == 0) {
        io_uring_cqe* cqe = nullptr;
        io_uring_wait_cqe(&ring_, &cqe);
      }
    io_uring_queue_exit(&ring_);
  }

  std::string_view name() const noexcept override { return "io_uring"; }
  std::uint32_t depth() const noexcept override { return depth_; }
  std::uint32_t max_iov() const noexcept override { return 1024; }

  Result<std::size_t> submit(std::span<const Io> batch) override {
    std::size_t taken = 0;
    for (; taken < batch.size() && in_flight_ + taken < depth_; ++taken) {
      io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
      if (!sqe) break;
      const Io& io = batch[taken];
      if (io.num_iov == 1) {
        const auto size = static_cast<unsigned>(io.iov->iov_len);
        io.write ? io_uring_prep_write(sqe, io.fd, io.iov->iov_base, size, io.offset)
                 : io_uring_prep_read(sqe, io.fd, io.iov->iov_base, size, io.offset);
      } else {
        io.write ? io_uring_prep_writev(sqe, io.fd, io.iov, io.num_iov, io.offset)
                 : io_uring_prep_readv(sqe, io.fd, io.iov, io.num_iov, io.offset);
      }
      sqe->user_data = io.slot;
    }
    in_flight_ += static_cast<std::uint32_t>(taken);
    NIXL_TRY(flush());
    return taken;
  }

  std::size_t reap(std::span<Done> out) override {
    // Entries that the kernel had no room for stay in the ring: offer them again.
    if (io_uring_sq_ready(&ring_) > 0) (void)flush();
    std::size_t count = 0;
    io_uring_cqe* cqe = nullptr;
    while (count < out.size() && io_uring_peek_cqe(&ring_, &cqe) == 0 && cqe) {
      if (cqe->user_data != kCancelTag) {
        out[count++] = {static_cast<std::uint32_t>(cqe->user_data), cqe->res};
        --in_flight_;
      }
      io_uring_cqe_seen(&ring_, cqe);
    }
    return count;
  }

  void cancel(std::uint32_t slot) noexcept override {
    io_uring_sqe* sqe = io_uring_get_sqe(&ring_);
    if (!sqe) return;  // no room: the Io ends by itself
    io_uring_prep_cancel64(sqe, slot, 0);
    sqe->user_data = kCancelTag;
    (void)flush();
  }

  int event_fd() const noexcept override { return ring_.ring_fd; }
  bool arm() noexcept override { return io_uring_cq_ready(&ring_) == 0; }

 private:
  Result<void> flush() {
    const int got = io_uring_submit(&ring_);
    if (got >= 0 || got == -EAGAIN || got == -EBUSY || got == -EINTR) return {};
    return fail(errno_error("io_uring_submit", -got));
  }

  io_uring ring_;
  std::uint32_t depth_;
  std::uint32_t in_flight_ = 0;
  pid_t owner_;
};

}  // namespace

Result<std::unique_ptr<Queue>> open_uring(std::uint32_t depth) {
  io_uring ring;
  io_uring_params params = {};
  params.flags = IORING_SETUP_CQSIZE | IORING_SETUP_CLAMP;
  params.cq_entries = 4 * depth;
  // Twice the depth, so that a cancel always finds an entry.
  const int error = io_uring_queue_init_params(2 * depth, &ring, &params);
  if (error < 0) {
    const char* hint =
        error == -EPERM || error == -ENOSYS ? "; see /proc/sys/kernel/io_uring_disabled and seccomp rules" : "";
    return fail(error == -EPERM || error == -ENOSYS ? Code::kUnsupported : Code::kIo, "io_uring_setup: %s%s",
                errno_text(-error).c_str(), hint);
  }
  io_uring_ring_dontfork(&ring);
  return std::make_unique<UringQueue>(ring, depth);
}

}  // namespace nixl::core::fileio
