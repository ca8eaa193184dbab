// The Linux AIO queue (io_submit, io_getevents). Completions carry an eventfd, so that a sleeper can be woken.
#include <libaio.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "base/fd.h"
#include "fileio/queue.h"

namespace nixl::core::fileio {
namespace {

// The system calls themselves: libaio adds nothing here but versioned symbols, which cannot be linked into another
// library.
template <typename... Arguments>
int kernel(long number, Arguments... arguments) noexcept {
  const long result = ::syscall(number, (long)arguments...);
  return static_cast<int>(result < 0 ? -errno : result);
}

class LinuxAioQueue final : public Queue {
 public:
  LinuxAioQueue(io_context_t context, Fd event, std::uint32_t depth)
      : context_(context), event_(std::move(event)), depth_(depth), owner_(::getpid()) {
    free_.reserve(depth);
    blocks_.resize(depth);
    for (std::uint32_t i = depth; i-- > 0;) free_.push_back(i);
    batch_.reserve(depth);
    events_.resize(64);
  }
  ~LinuxAioQueue() override {
    if (::getpid() == owner_) kernel(SYS_io_destroy, context_);  // waits for what is in flight
  }

  std::string_view name() const noexcept override { return "libaio"; }
  std::uint32_t depth() const noexcept override { return depth_; }
  std::uint32_t max_iov() const noexcept override { return 1024; }

  Result<std::size_t> submit(std::span<const Io> batch) override {
    batch_.clear();
    for (const Io& io : batch) {
      if (free_.empty()) break;
      const std::uint32_t index = free_.back();
      free_.pop_back();
      iocb& block = blocks_[index].control;
      prepare(io, &block);
      io_set_eventfd(&block, event_.get());
      blocks_[index].slot = io.slot;
      batch_.push_back(&block);
    }
    std::size_t taken = 0;
    while (taken < batch_.size()) {
      const int got = kernel(SYS_io_submit, context_, static_cast<long>(batch_.size() - taken), batch_.data() + taken);
      if (got > 0) {
        taken += static_cast<std::size_t>(got);
      } else if (got == -EINTR) {
        continue;
      } else if (got == -EAGAIN || got == 0) {
        break;
      } else {
        // The first one is refused (EBADF, EINVAL): that is its result; the others go on.
        refused_.push_back({take_back(taken).slot, got});
        ++taken;
      }
    }
    for (std::size_t i = taken; i < batch_.size(); ++i) take_back(i);
    return taken;
  }

  std::size_t reap(std::span<Done> out) override {
    std::size_t count = 0;
    for (; count < out.size() && !refused_.empty(); ++count, refused_.pop_back()) out[count] = refused_.back();
    timespec none = {};
    while (count < out.size()) {
      const auto room = static_cast<long>(std::min(out.size() - count, events_.size()));
      const int got = kernel(SYS_io_getevents, context_, 0, room, events_.data(), &none);
      if (got == -EINTR) continue;
      for (int i = 0; i < got; ++i) {
        const auto* block = reinterpret_cast<Block*>(events_[i].obj);
        out[count++] = {block->slot, static_cast<std::int64_t>(events_[i].res)};
        free_.push_back(static_cast<std::uint32_t>(block - blocks_.data()));
      }
      if (got < room) break;
    }
    return count;
  }

  void cancel(std::uint32_t slot) noexcept override {
    for (Block& block : blocks_)
      if (block.slot == slot) {
        io_event event;
        // Few drivers can; where it succeeds the event still arrives through io_getevents.
        kernel(SYS_io_cancel, context_, &block.control, &event);
      }
  }

  int event_fd() const noexcept override { return event_.get(); }
  bool arm() noexcept override {
    std::uint64_t count = 0;
    const bool stale = ::read(event_.get(), &count, sizeof count) > 0;
    return !stale && refused_.empty();
  }

 private:
  struct Block {
    iocb control;  // first: the kernel hands its address back
    std::uint32_t slot = UINT32_MAX;
  };
  static void prepare(const Io& io, iocb* block) {
    const auto offset = static_cast<long long>(io.offset);
    const int count = static_cast<int>(io.num_iov);
    if (io.num_iov == 1) {
      io.write ? io_prep_pwrite(block, io.fd, io.iov->iov_base, io.iov->iov_len, offset)
               : io_prep_pread(block, io.fd, io.iov->iov_base, io.iov->iov_len, offset);
    } else {
      io.write ? io_prep_pwritev(block, io.fd, io.iov, count, offset)
               : io_prep_preadv(block, io.fd, io.iov, count, offset);
    }
  }
  Block& take_back(std::size_t i) {
    auto* block = reinterpret_cast<Block*>(batch_[i]);
    free_.push_back(static_cast<std::uint32_t>(block - blocks_.data()));
    return *block;
  }

  io_context_t context_;
  Fd event_;
  std::uint32_t depth_;
  pid_t owner_;
  std::vector<Block> blocks_;
  std::vector<std::uint32_t> free_;
  std::vector<iocb*> batch_;
  std::vector<io_event> events_;
  std::vector<Done> refused_;
};

}  // namespace

Result<std::unique_ptr<Queue>> open_linux_aio(std::uint32_t depth) {
  Fd event(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!event) return fail(errno_error("eventfd", errno));
  io_context_t context = nullptr;
  const int error = kernel(SYS_io_setup, depth, &context);
  if (error < 0) {
    const char* hint = error == -EAGAIN ? "; raise /proc/sys/fs/aio-max-nr" : "";
    return fail(error == -ENOSYS ? Code::kUnsupported : Code::kIo, "io_setup(%u): %s%s", depth,
                errno_text(-error).c_str(), hint);
  }
  return std::make_unique<LinuxAioQueue>(context, std::move(event), depth);
}

}  // namespace nixl::core::fileio
