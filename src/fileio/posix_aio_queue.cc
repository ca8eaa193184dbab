// The POSIX AIO queue (aio_read, aio_write of the C library, which runs them on threads, one a file). The slowest of
// the four and the most portable. No descriptor tells of completions: it must be polled.
#include <aio.h>
#include <unistd.h>

#include <cerrno>

#include "fileio/queue.h"

namespace nixl::core::fileio {
namespace {

class PosixAioQueue final : public Queue {
 public:
  explicit PosixAioQueue(std::uint32_t depth) : depth_(depth), owner_(::getpid()), blocks_(depth) {
    free_.reserve(depth);
    for (std::uint32_t i = depth; i-- > 0;) free_.push_back(i);
    running_.reserve(depth);
  }
  ~PosixAioQueue() override {
    if (::getpid() != owner_) return;
    for (const std::uint32_t index : running_) {
      const aiocb* one[] = {&blocks_[index].control};
      while (aio_error(one[0]) == EINPROGRESS) aio_suspend(one, 1, nullptr);
    }
  }

  std::string_view name() const noexcept override { return "posix_aio"; }
  std::uint32_t depth() const noexcept override { return depth_; }
  std::uint32_t max_iov() const noexcept override { return 1; }

  Result<std::size_t> submit(std::span<const Io> batch) override {
    std::size_t taken = 0;
    for (; taken < batch.size() && !free_.empty(); ++taken) {
      const Io& io = batch[taken];
      const std::uint32_t index = free_.back();
      aiocb& control = blocks_[index].control;
      control = {};
      control.aio_fildes = io.fd;
      control.aio_buf = io.iov->iov_base;
      control.aio_nbytes = io.iov->iov_len;
      control.aio_offset = static_cast<off_t>(io.offset);
      control.aio_sigevent.sigev_notify = SIGEV_NONE;
      if ((io.write ? aio_write(&control) : aio_read(&control)) != 0) {
        if (errno == EAGAIN) break;
        refused_.push_back({io.slot, -errno});
        continue;
      }
      free_.pop_back();
      blocks_[index].slot = io.slot;
      running_.push_back(index);
    }
    return taken;
  }

  std::size_t reap(std::span<Done> out) override {
    std::size_t count = 0;
    for (; count < out.size() && !refused_.empty(); ++count, refused_.pop_back()) out[count] = refused_.back();
    for (std::size_t i = 0; i < running_.size() && count < out.size();) {
      Block& block = blocks_[running_[i]];
      const int error = aio_error(&block.control);
      if (error == EINPROGRESS) {
        ++i;
        continue;
      }
      const ssize_t bytes = aio_return(&block.control);
      out[count++] = {block.slot, error ? -error : bytes};
      free_.push_back(running_[i]);
      running_[i] = running_.back();
      running_.pop_back();
    }
    return count;
  }

  void cancel(std::uint32_t slot) noexcept override {
    for (const std::uint32_t index : running_)
      if (blocks_[index].slot == slot) aio_cancel(blocks_[index].control.aio_fildes, &blocks_[index].control);
  }

 private:
  struct Block {
    aiocb control;
    std::uint32_t slot = 0;
  };
  std::uint32_t depth_;
  pid_t owner_;
  std::vector<Block> blocks_;
  std::vector<std::uint32_t> free_, running_;
  std::vector<Done> refused_;
};

}  // namespace

Result<std::unique_ptr<Queue>> open_posix_aio(std::uint32_t depth) {
  return std::make_unique<PosixAioQueue>(depth);
}

}  // namespace nixl::core::fileio
