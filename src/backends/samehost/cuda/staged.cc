// VRAM on one side, DRAM on the other: a kernel gathers or scatters between the GPU and a pinned buffer, and the buffer
// is copied from or to the process that owns the DRAM. Several copy threads keep both links busy.
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <span>

#include "backends/samehost/cuda/transfers.h"

namespace nixl::core::samehost {
namespace {

constexpr Nanoseconds kKernelDeadline = 30'000'000'000;
constexpr Nanoseconds kAskEvery = 1'000'000;
constexpr std::uint64_t kItemBytes =
    64 << 10;  // for a warp: one alone takes 0.4 ms for 1 MiB, 256 gain nothing over 16
constexpr std::uint64_t kMaxItems = kMaxPieces + kMaxChunkBytes / kItemBytes;

struct Stage {
  PinnedList list;
  PinnedPool::Piece buffer;
  cudaStream_t stream;
};

class StagedJob final : public TransferJob {
 public:
  struct Pair {
    std::uint64_t gpu, host;
    std::uint32_t bytes;
  };
  StagedJob(std::shared_ptr<Devices> devices, std::shared_ptr<Device> device, const Plan& plan,
            std::vector<Pair> pieces, std::vector<std::size_t> starts, std::shared_ptr<Mailbox> mailbox)
      : TransferJob(static_cast<std::uint32_t>(starts.size() - 1), plan, std::move(mailbox)),
        devices_(std::move(devices)),
        device_(std::move(device)),
        from_gpu_((plan.local_kind == MemKind::kVram) == (plan.op == Op::kWrite)),
        host_is_remote_(plan.remote_kind == MemKind::kDram),
        pieces_(std::move(pieces)),
        starts_(std::move(starts)) {}

 private:
  Result<void> copy_chunk(std::uint32_t index) override;
  Result<std::unique_ptr<Stage>> take_stage();
  void give_back(std::unique_ptr<Stage> stage);
  Result<void> run_kernel(Stage& stage);
  Result<void> copy_host(std::span<iovec> buffer, std::span<iovec> host);
  Result<void> move(std::uint32_t index, Stage& stage);

  const std::shared_ptr<Devices> devices_;
  const std::shared_ptr<Device> device_;
  const bool from_gpu_, host_is_remote_;
  const std::vector<Pair> pieces_;
  const std::vector<std::size_t> starts_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Stage>> idle_;
};

Result<std::unique_ptr<Stage>> StagedJob::take_stage() {
  {
    std::lock_guard lock(mutex_);
    if (!idle_.empty()) {
      auto stage = std::move(idle_.back());
      idle_.pop_back();
      return stage;
    }
  }
  const DeviceScope scope(device_->ordinal());
  NIXL_ASSIGN(auto list, PinnedList::create(*devices_, device_, kMaxItems, devices_->blocks(true)));
  NIXL_ASSIGN(auto buffer, devices_->pinned->take(kMaxChunkBytes));
  return std::unique_ptr<Stage>(new Stage{std::move(list), std::move(buffer), device_->next_stream()});
}

void StagedJob::give_back(std::unique_ptr<Stage> stage) {
  std::lock_guard lock(mutex_);
  idle_.push_back(std::move(stage));
}

Result<void> StagedJob::run_kernel(Stage& stage) {
  const DeviceScope scope(device_->ordinal());
  NIXL_TRY(stage.list.launch(stage.stream));
  const Deadline deadline = Deadline::after(kKernelDeadline);
  Nanoseconds ask_at = now_ns() + kAskEvery;
  while (!stage.list.done()) {
    const Nanoseconds now = now_ns();
    if (now < ask_at) continue;
    ask_at = now + kAskEvery;
    if (const auto code = ::cudaStreamQuery(stage.stream); code != cudaSuccess && code != cudaErrorNotReady)
      return cuda_error("the copy between GPU and pinned memory", code);
    if (deadline.passed())
      return fail(Code::kTimeout, "GPU %d: a copy of %llu pieces did not end within %lld s", device_->ordinal(),
                  static_cast<unsigned long long>(stage.list.size()),
                  static_cast<long long>(kKernelDeadline / 1'000'000'000));
  }
  return {};
}

Result<void> StagedJob::copy_host(std::span<iovec> buffer, std::span<iovec> host) {
  const Op op = from_gpu_ ? Op::kWrite : Op::kRead;  // seen from the buffer
  if (host_is_remote_) return ending.peer().process().copy(op, buffer, host);
  // Through the kernel as well: memory that its owner has freed answers with an error, not with a crash.
  const auto call = op == Op::kWrite ? ::process_vm_writev : ::process_vm_readv;
  ssize_t wanted = 0;
  for (const iovec& piece : buffer) wanted += static_cast<ssize_t>(piece.iov_len);
  const ssize_t moved = call(::getpid(), buffer.data(), buffer.size(), host.data(), host.size(), 0);
  if (moved == wanted) return {};
  return fail(Code::kIo, "local memory from %p on: %zd of %zd bytes copied (%s); was it freed while registered?",
              host[0].iov_base, moved, wanted, moved < 0 ? errno_text(errno).c_str() : "the rest is not mapped");
}

Result<void> StagedJob::move(std::uint32_t index, Stage& stage) {
  std::array<iovec, kMaxPieces> buffer, host;
  std::size_t count = 0, at = 0;
  stage.list.clear();
  for (std::size_t i = starts_[index]; i < starts_[index + 1]; ++i, ++count) {
    const Pair& piece = pieces_[i];
    char* const here = stage.buffer.data() + at;
    const auto address = reinterpret_cast<std::uint64_t>(here);
    for (std::uint32_t off = 0, bytes; off < piece.bytes; off += bytes) {
      bytes = static_cast<std::uint32_t>(std::min<std::uint64_t>(piece.bytes - off, kItemBytes));
      if (from_gpu_)
        stage.list.add(address + off, piece.gpu + off, bytes);
      else
        stage.list.add(piece.gpu + off, address + off, bytes);
    }
    buffer[count] = {here, piece.bytes};
    host[count] = {reinterpret_cast<void*>(piece.host), piece.bytes};
    at += piece.bytes;
  }
  if (from_gpu_) {
    NIXL_TRY(run_kernel(stage));
    return copy_host({buffer.data(), count}, {host.data(), count});
  }
  NIXL_TRY(copy_host({buffer.data(), count}, {host.data(), count}));
  return run_kernel(stage);
}

Result<void> StagedJob::copy_chunk(std::uint32_t index) {
  NIXL_TRY(ending.peer().check_alive());
  NIXL_TRY(ending.check_all_registered());
  NIXL_ASSIGN(auto stage, take_stage());
  auto moved = move(index, *stage);
  if (moved) give_back(std::move(stage));
  if (!moved && moved.error().code == Code::kPeerLost) NIXL_TRY(ending.peer().check_alive(true));
  return moved;
}

}  // namespace

Result<StagedRoute> staged_route(const Plan& plan, Assignment assignment) {
  std::vector<int>& device_of = assignment.device_of;
  // One device scatters or gathers, and reaches a peer's other devices through the link; of our own only with peer access.
  if (assignment.by_remote) device_of.assign(device_of.size(), device_of[0]);
  for (const int device : device_of)
    if (device != device_of[0])
      return fail(Code::kUnsupported, "one transfer between host memory and GPUs %d and %d; make one for each",
                  device_of[0], device);
  NIXL_ASSIGN(auto deltas, deltas_of(plan, assignment, device_of[0]));
  return StagedRoute{device_of[0], std::move(deltas)};
}

Result<std::unique_ptr<Transfer>> make_staged(std::shared_ptr<Devices> devices, const Plan& plan,
                                              std::shared_ptr<Mailbox> mailbox, std::shared_ptr<CopyThreads> threads,
                                              const StagedRoute& route) {
  const bool gpu_is_local = plan.local_kind == MemKind::kVram;
  std::vector<StagedJob::Pair> pieces;
  std::vector<std::size_t> starts{0};
  pieces.reserve(plan.num_blocks);
  std::uint64_t bytes = 0;
  for (PlanCursor cursor(plan); !cursor.at_end();) {
    if (bytes == kMaxChunkBytes || pieces.size() - starts.back() == kMaxPieces) {
      starts.push_back(pieces.size());
      bytes = 0;
    }
    const Piece piece = cursor.next(kMaxChunkBytes - bytes);
    bytes += piece.length;
    pieces.push_back({gpu_is_local ? piece.local : piece.remote + route.deltas[piece.remote_region],
                      gpu_is_local ? piece.remote : piece.local, static_cast<std::uint32_t>(piece.length)});
  }
  if (starts.back() != pieces.size()) starts.push_back(pieces.size());
  NIXL_ASSIGN(auto device, devices->at(route.device));
  const bool small = starts.size() <= 2;
  auto job = std::make_shared<StagedJob>(std::move(devices), std::move(device), plan, std::move(pieces),
                                         std::move(starts), std::move(mailbox));
  return std::make_unique<JobTransfer>(plan, std::move(job), small ? nullptr : std::move(threads), "staged+cma");
}

}  // namespace nixl::core::samehost
