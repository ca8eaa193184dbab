#include "backends/samehost/vram.h"

#include <dirent.h>

#include <algorithm>
#include <functional>

#include "backends/samehost/cuda/transfers.h"
#include "base/env.h"
#include "base/log.h"

namespace nixl::core::samehost {
namespace {

// Half of a large GPU: fills the link and leaves room for the model's kernels.
constexpr std::int64_t kDefaultBlocks = 64;
constexpr const char* kDirectEnv = "NIXL_SAME_HOST_DIRECT";

Result<std::uint32_t> blocks_from_environment() {
  NIXL_ASSIGN(const auto asked, env_int("NIXL_SAME_HOST_GPU_BLOCKS"));
  const std::int64_t blocks = asked.value_or(kDefaultBlocks);
  if (blocks < 1 || blocks > 1024)
    return fail(Code::kInvalidArgument, "NIXL_SAME_HOST_GPU_BLOCKS=%lld; allowed: 1 to 1024",
                static_cast<long long>(blocks));
  return static_cast<std::uint32_t>(blocks);
}

// Direct for as long as others keep the host memory page-locked, and through staging buffers from the first submission on
// that finds it is not.
class HostTransfer final : public SizedTransfer {
 public:
  using MakeStaged = std::function<Result<std::unique_ptr<Transfer>>()>;  // called once at most
  HostTransfer(const Plan& plan, std::shared_ptr<DeviceJob> job, std::unique_ptr<Transfer> direct, MakeStaged make)
      : SizedTransfer(plan), job_(std::move(job)), transfer_(std::move(direct)), make_staged_(std::move(make)) {}

  Result<TransferState> submit(std::optional<std::string_view> message) override {
    if (job_) {
      NIXL_TRY(job_->host()->check_mapped());
      if (const auto locked = job_->host()->check(); !locked) {
        NIXL_WARN("a request between host and GPU memory goes through staging buffers from now on: %s",
                  locked.error().reason.c_str());
        NIXL_ASSIGN(transfer_, make_staged_());
        job_.reset();
        make_staged_ = nullptr;
      }
    }
    return transfer_->submit(message);
  }
  Result<TransferState> poll() override { return transfer_->poll(); }
  bool cancel() noexcept override { return transfer_->cancel(); }
  std::string path() const override { return transfer_->path(); }

 private:
  std::shared_ptr<DeviceJob> job_;  // null: staged
  std::unique_ptr<Transfer> transfer_;
  MakeStaged make_staged_;
};

class CudaVram final : public Vram {
 public:
  CudaVram(const Driver& driver, std::uint32_t blocks, bool direct, std::shared_ptr<Mailbox> mailbox)
      : exchange_(driver), devices_(std::make_shared<Devices>(blocks)), direct_(direct), mailbox_(std::move(mailbox)) {}

  Result<std::unique_ptr<VramExport>> export_region(const Region& region) override {
    NIXL_ASSIGN(auto exported, exchange_.export_region(region));
    home_ = exported->device();
    return exported;
  }
  Result<std::unique_ptr<VramMapping>> map_region(PeerProcess& peer, const Region&, std::string_view key) override {
    return exchange_.map_region(peer, key, home_);
  }
  Result<std::unique_ptr<Transfer>> prepare(Plan plan, std::shared_ptr<CopyThreads> threads) override;
  bool progress() noexcept override;
  bool busy() const noexcept override { return num_running_.load(std::memory_order_acquire) > 0; }

 private:
  Result<std::unique_ptr<Transfer>> prepare_mixed(Plan plan, std::shared_ptr<CopyThreads> threads,
                                                  const Assignment& assignment);
  Result<HostSide> reach_host(const Plan& plan, int device);
  std::unique_ptr<Transfer> on_device(const Plan& plan, std::shared_ptr<DeviceJob> job) {
    return std::make_unique<DeviceTransfer>(plan, std::move(job),
                                            [this](std::shared_ptr<DeviceJob> started) { enter(std::move(started)); });
  }
  void enter(std::shared_ptr<DeviceJob> job);

  MemoryExchange exchange_;
  const std::shared_ptr<Devices> devices_;
  const bool direct_;  // host memory and GPUs without staging, where it can be
  const std::shared_ptr<Mailbox> mailbox_;
  int home_ = -1;  // the device of the last region of ours
  std::mutex mutex_;
  std::vector<std::shared_ptr<DeviceJob>> running_;
  std::atomic<std::size_t> num_running_{0};
};

Result<HostSide> CudaVram::reach_host(const Plan& plan, int device) {
  if (!direct_) return fail(Code::kUnsupported, "%s says so", kDirectEnv);
  return HostSide::open(exchange_.driver(), plan, device);
}

Result<std::unique_ptr<Transfer>> CudaVram::prepare(Plan plan, std::shared_ptr<CopyThreads> threads) {
  int home = home_;
  if (home < 0) NIXL_CUDA_TRY(::cudaGetDevice(&home));
  const Assignment assignment = assign(plan, home);
  if (plan.local_kind != plan.remote_kind) return prepare_mixed(std::move(plan), std::move(threads), assignment);
  NIXL_ASSIGN(auto job, DeviceJob::create(*devices_, plan, assignment, std::nullopt));
  return on_device(plan, std::move(job));
}

Result<std::unique_ptr<Transfer>> CudaVram::prepare_mixed(Plan plan, std::shared_ptr<CopyThreads> threads,
                                                          const Assignment& assignment) {
  auto host = reach_host(plan, assignment.device_of[0]);
  if (!host) {
    NIXL_DEBUG("a request between host and GPU memory goes through staging buffers: %s", host.error().reason.c_str());
    NIXL_ASSIGN(const StagedRoute route, staged_route(plan, assignment));
    return make_staged(devices_, plan, mailbox_, std::move(threads), route);
  }
  NIXL_ASSIGN(auto job, DeviceJob::create(*devices_, plan, assignment, std::move(*host)));
  auto direct = on_device(plan, job);
  if (!job->host()->can_change()) return direct;
  auto route = staged_route(plan, assignment);
  // Kept whole: what others may take away any time must leave a way to go on.
  const auto kept = std::make_shared<const Plan>(std::move(plan));
  auto make = [devices = devices_, kept, mailbox = mailbox_, threads = std::move(threads), route = std::move(route)] {
    return route.and_then([&](const StagedRoute& way) { return make_staged(devices, *kept, mailbox, threads, way); });
  };
  return std::make_unique<HostTransfer>(*kept, std::move(job), std::move(direct), std::move(make));
}

void CudaVram::enter(std::shared_ptr<DeviceJob> job) {
  {
    std::lock_guard lock(mutex_);
    if (std::find(running_.begin(), running_.end(), job) == running_.end()) running_.push_back(std::move(job));
    num_running_.store(running_.size(), std::memory_order_release);
  }
  mailbox_->ring_own();  // sleeping progress looks after it from now on
}

bool CudaVram::progress() noexcept {
  if (!busy()) return false;
  std::vector<std::shared_ptr<DeviceJob>> jobs;
  {
    std::lock_guard lock(mutex_);
    jobs = running_;
  }
  bool ended = false;
  for (const auto& job : jobs) ended |= job->look();
  std::lock_guard lock(mutex_);
  // A job that was started again meanwhile is running, and stays.
  std::erase_if(running_, [](const auto& job) { return !job->running(); });
  num_running_.store(running_.size(), std::memory_order_release);
  return ended;
}

}  // namespace

Result<void> Vram::probe() {
  DIR* const folder = ::opendir("/proc/driver/nvidia/gpus");
  if (!folder) return fail(Code::kUnsupported, "no NVIDIA driver is loaded (/proc/driver/nvidia/gpus is missing)");
  int entries = 0;
  while (::readdir(folder)) ++entries;
  ::closedir(folder);
  if (entries <= 2)
    return fail(Code::kUnsupported, "the NVIDIA driver shows no GPU (/proc/driver/nvidia/gpus is empty)");
  return {};
}

Result<std::unique_ptr<Vram>> Vram::open(std::shared_ptr<Mailbox> mailbox) {
  NIXL_TRY(probe());
  NIXL_ASSIGN(const Driver* const driver, Driver::get());
  NIXL_ASSIGN(const std::uint32_t blocks, blocks_from_environment());
  NIXL_ASSIGN(const auto direct, env_bool(kDirectEnv));
  return std::make_unique<CudaVram>(*driver, blocks, direct.value_or(true), std::move(mailbox));
}

}  // namespace nixl::core::samehost
