// Transfers with GPU memory on one side or on both.
#pragma once
#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backends/samehost/cuda/device.h"
#include "backends/samehost/cuda/host_memory.h"
#include "backends/samehost/cuda/memory.h"
#include "backends/samehost/transfer.h"
#include "contract/plan_cursor.h"

namespace nixl::core::samehost {

// What transfers share: devices by ordinal (opened when first used) and pinned memory.
class Devices {
 public:
  Devices(std::uint32_t max_blocks) : pinned(std::make_shared<PinnedPool>()), max_blocks(max_blocks) {}
  Result<std::shared_ptr<Device>> at(int ordinal);
  const std::shared_ptr<PinnedPool> pinned;
  // A list copy's share of the device's multiprocessors; a link to host memory is full long before one between GPUs.
  static constexpr std::uint32_t kHostBlocks = 16;
  std::uint32_t blocks(bool with_host) const noexcept {
    return with_host ? std::min(max_blocks, kHostBlocks) : max_blocks;
  }
  const std::uint32_t max_blocks;

 private:
  std::mutex mutex_;
  std::map<int, std::shared_ptr<Device>> open_;
};

// A list in pinned memory, ready to be launched.
class PinnedList {
 public:
  static Result<PinnedList> create(Devices& devices, std::shared_ptr<Device> device, std::uint64_t max_items,
                                   std::uint32_t max_blocks);
  PinnedList(PinnedList&& other) noexcept;
  ~PinnedList();

  void clear() noexcept { copy_.num_items = 0; }
  void add(std::uint64_t destination, std::uint64_t source, std::uint32_t length) noexcept;
  // Every row as one item; `deltas` by remote region as in deltas_of.
  void add_rows(const Plan& plan, const std::vector<std::uint64_t>& deltas) noexcept;
  std::uint64_t size() const noexcept { return copy_.num_items; }
  // Starts the copy on a stream of its device. One at a time.
  Result<void> launch(cudaStream_t stream);
  // The word alone, behind what is on the stream.
  Result<void> signal(cudaStream_t stream);
  bool done() const noexcept;
  Device& device() const noexcept { return *device_; }

 private:
  PinnedList() = default;
  std::shared_ptr<Device> device_;
  PinnedPool::Piece memory_;
  std::uint64_t *source_ = nullptr, *destination_ = nullptr;
  std::uint32_t* length_ = nullptr;
  ListCopy copy_;
  std::uint32_t max_blocks_ = 1;
};

// Which device copies what.
struct Assignment {
  std::vector<int> device_of;  // by local region where that side is VRAM, else by remote region
  bool by_remote = false;
  int at(const Piece& piece) const noexcept { return device_of[by_remote ? piece.remote_region : piece.local_region]; }
};
// Local GPU memory is copied by its own device, a peer's to and from host memory by the one that holds it; `home`: where
// the driver does not tell which that is.
Assignment assign(const Plan& plan, int home);

// VRAM to VRAM, or between VRAM and host memory within reach of GPUs: one kernel for the list, or the copy engine for a
// few large pieces. On several devices if the GPU memory is.
class DeviceJob {
 public:
  // `host`: of the plan, where one side is host memory.
  static Result<std::shared_ptr<DeviceJob>> create(Devices& devices, const Plan& plan, const Assignment& assignment,
                                                   std::optional<HostSide> host);
  Ending ending;

  const HostSide* host() const noexcept { return host_ ? &*host_ : nullptr; }
  Result<void> start();
  // Looks whether the device is through; true when the submission has ended. Any thread.
  bool look();
  bool running() const noexcept { return running_.load(std::memory_order_acquire); }
  void abandon() noexcept { abandoned_.store(true, std::memory_order_release); }
  const std::optional<Error>& error() const noexcept { return error_; }  // when not running
  const std::string& path() const noexcept { return path_; }

 private:
  struct Direct {
    void* destination;
    const void* source;
    std::size_t bytes;
  };
  struct Part {  // what one device does
    PinnedList list;
    std::vector<Direct> direct;
    cudaStream_t stream = nullptr;
  };
  explicit DeviceJob(const Plan& plan) : ending(plan) {}
  Result<void> fill(Devices& devices, const Plan& plan, const Assignment& assignment);
  void add_direct(Part& part, const Plan& plan, const Piece& piece, std::uint64_t delta);
  void finish(std::optional<Error> error);

  std::vector<Part> parts_;
  std::mutex mutex_;
  std::atomic<bool> running_{false}, abandoned_{false};
  Nanoseconds asked_at_ = 0;
  std::optional<Error> error_;
  std::optional<HostSide> host_;
  std::string path_;
};

class DeviceTransfer final : public SizedTransfer {
 public:
  // `entered` is told of every job that was started, so that progress() looks after it.
  DeviceTransfer(const Plan& plan, std::shared_ptr<DeviceJob> job,
                 std::function<void(std::shared_ptr<DeviceJob>)> entered)
      : SizedTransfer(plan), job_(std::move(job)), entered_(std::move(entered)) {}
  Result<TransferState> submit(std::optional<std::string_view> message) override;
  Result<TransferState> poll() override;
  bool cancel() noexcept override;
  std::string path() const override { return job_->path(); }

 private:
  std::shared_ptr<DeviceJob> job_;
  std::function<void(std::shared_ptr<DeviceJob>)> entered_;
};

// How staging reaches the GPU memory of a plan: the device that gathers or scatters, and what it adds to remote addresses.
struct StagedRoute {
  int device = 0;
  std::vector<std::uint64_t> deltas;  // by remote region
};
Result<StagedRoute> staged_route(const Plan& plan, Assignment assignment);
// One side VRAM, the other DRAM: through pinned memory, chunk by chunk, several chunks at once. Any thread.
Result<std::unique_ptr<Transfer>> make_staged(std::shared_ptr<Devices> devices, const Plan& plan,
                                              std::shared_ptr<Mailbox> mailbox, std::shared_ptr<CopyThreads> threads,
                                              const StagedRoute& route);

// By remote region: what to add to an address of the plan when `device` copies; 0 for host memory that is not mapped
// here, and for regions that another device is to copy.
Result<std::vector<std::uint64_t>> deltas_of(const Plan& plan, const Assignment& assignment, int device);

}  // namespace nixl::core::samehost
