#include "backends/samehost/cuda/transfers.h"

#include <algorithm>

namespace nixl::core::samehost {
namespace {

constexpr std::uint64_t kMinItem = 4096;
constexpr std::uint64_t kMaxItem = 1 << 30;
constexpr std::uint64_t kItemsPerWarp = 8;       // enough for even shares
constexpr std::uint64_t kEngineBytes = 8 << 20;  // from this average size on, the copy engine is as fast
constexpr std::uint64_t kEnginePieces = 64;
// So few always go there: kernels of processes that share a GPU take turns of a millisecond, copy engines do not wait for
// them.
constexpr std::uint64_t kFewPieces = 4;
constexpr Nanoseconds kAskStreamEvery = 1'000'000;
constexpr std::size_t kHeaderBytes = 64;  // of a pinned list: the done word, alone in its cache line

std::uint64_t blocks_of(const Plan& plan, std::size_t row) {
  return plan.has_runs() ? plan.count[row] : 1;
}

// How many pieces of at most `item` bytes the plan makes, and whether every row is one of them.
struct Count {
  std::uint64_t items = 0;
  bool one_a_row = true;
};
Count count_items(const Plan& plan, std::uint64_t item) {
  Count count;
  count.one_a_row = !plan.has_runs();
  for (std::size_t row = 0; row < plan.num_rows(); ++row) {
    const bool small = plan.length[row] <= item;  // a division a row would cost more than everything else here
    count.items += (small ? 1 : (plan.length[row] + item - 1) / item) * blocks_of(plan, row);
    count.one_a_row &= small;
  }
  return count;
}

Span& span_of(const RemoteRegion* region) {
  return static_cast<const CudaMapping*>(static_cast<const FarRegion*>(region)->vram())->span();
}

}  // namespace

Result<std::shared_ptr<Device>> Devices::at(int ordinal) {
  std::lock_guard lock(mutex_);
  auto& device = open_[ordinal];
  if (!device) {
    NIXL_ASSIGN(device, Device::open(ordinal));
  }
  return device;
}

Assignment assign(const Plan& plan, int home) {
  Assignment assignment;
  assignment.by_remote = plan.local_kind == MemKind::kDram;
  if (!assignment.by_remote) {
    for (const LocalRegion* region : plan.local_regions)
      assignment.device_of.push_back(static_cast<const OwnRegion*>(region)->vram()->device());
    return assignment;
  }
  for (const RemoteRegion* region : plan.remote_regions) {
    const int owner = span_of(region).owner(home);
    assignment.device_of.push_back(owner < 0 ? home : owner);
  }
  return assignment;
}

Result<std::vector<std::uint64_t>> deltas_of(const Plan& plan, const Assignment& assignment, int device) {
  std::vector<std::uint64_t> deltas(plan.remote_regions.size(), 0);
  for (std::size_t region = 0; region < deltas.size(); ++region) {
    if (plan.remote_kind == MemKind::kDram) {
      const SharedMapping* const shared = static_cast<const FarRegion*>(plan.remote_regions[region])->shared();
      if (shared) deltas[region] = shared->delta();
    } else if (!assignment.by_remote || assignment.device_of[region] == device) {
      NIXL_ASSIGN(deltas[region], span_of(plan.remote_regions[region]).reach(device));
    }
  }
  return deltas;
}

Result<PinnedList> PinnedList::create(Devices& devices, std::shared_ptr<Device> device, std::uint64_t max_items,
                                      std::uint32_t max_blocks) {
  PinnedList list;
  const DeviceScope scope(device->ordinal());
  NIXL_ASSIGN(list.memory_, devices.pinned->take(kHeaderBytes + max_items * 20));
  NIXL_ASSIGN(list.copy_.blocks_done, device->take_counter());
  list.device_ = std::move(device);
  char* at = list.memory_.data();
  list.copy_.done = reinterpret_cast<std::uint32_t*>(at);
  *list.copy_.done = 0;
  list.source_ = reinterpret_cast<std::uint64_t*>(at + kHeaderBytes);
  list.destination_ = list.source_ + max_items;
  list.length_ = reinterpret_cast<std::uint32_t*>(list.destination_ + max_items);
  list.copy_.source = list.source_;
  list.copy_.destination = list.destination_;
  list.copy_.length = list.length_;
  list.max_blocks_ = max_blocks;
  return list;
}

PinnedList::PinnedList(PinnedList&& other) noexcept
    : device_(std::move(other.device_)),
      memory_(std::move(other.memory_)),
      source_(other.source_),
      destination_(other.destination_),
      length_(other.length_),
      copy_(other.copy_),
      max_blocks_(other.max_blocks_) {}

PinnedList::~PinnedList() {
  if (device_) device_->give_back_counter(copy_.blocks_done);
}

void PinnedList::add(std::uint64_t destination, std::uint64_t source, std::uint32_t length) noexcept {
  const std::uint64_t at = copy_.num_items++;
  destination_[at] = destination;
  source_[at] = source;
  length_[at] = length;
}

void PinnedList::add_rows(const Plan& plan, const std::vector<std::uint64_t>& deltas) noexcept {
  const bool write = plan.op == Op::kWrite;
  std::uint64_t* const near = (write ? source_ : destination_) + copy_.num_items;
  std::uint64_t* const far = (write ? destination_ : source_) + copy_.num_items;
  for (std::size_t row = 0; row < plan.num_rows(); ++row) {
    near[row] = plan.local_address[row];
    far[row] = plan.remote_address[row] + deltas[plan.remote_region[row]];
    length_[copy_.num_items + row] = static_cast<std::uint32_t>(plan.length[row]);
  }
  copy_.num_items += plan.num_rows();
}

Result<void> PinnedList::launch(cudaStream_t stream) {
  constexpr std::uint64_t kWarps = kThreadsPerBlock / 32;
  copy_.num_blocks =
      static_cast<std::uint32_t>(std::clamp<std::uint64_t>((copy_.num_items + kWarps - 1) / kWarps, 1, max_blocks_));
  ++copy_.epoch;
  NIXL_CUDA_TRY(launch_list_copy(copy_, stream));
  return {};
}

Result<void> PinnedList::signal(cudaStream_t stream) {
  ++copy_.epoch;
  NIXL_ASSIGN(const Driver* const driver, Driver::get());
  const CUresult code = driver->write_value(stream, reinterpret_cast<CUdeviceptr>(copy_.done), copy_.epoch,
                                            CU_STREAM_WRITE_VALUE_DEFAULT);
  if (code == CUDA_SUCCESS) return {};
  if (code != CUDA_ERROR_NOT_SUPPORTED) return cuda_error("cuStreamWriteValue32", code);
  NIXL_CUDA_TRY(launch_signal(copy_.done, copy_.epoch, stream));
  return {};
}

bool PinnedList::done() const noexcept {
  return __atomic_load_n(copy_.done, __ATOMIC_ACQUIRE) == copy_.epoch;
}

Result<std::shared_ptr<DeviceJob>> DeviceJob::create(Devices& devices, const Plan& plan, const Assignment& assignment,
                                                     std::optional<HostSide> host) {
  std::shared_ptr<DeviceJob> job(new DeviceJob(plan));
  job->host_ = std::move(host);
  job->path_ = job->host_ ? job->host_->how() : "";
  if (plan.remote_kind == MemKind::kVram)
    job->path_ += (job->host_ ? "+" : "") + std::string(span_of(plan.remote_regions[0]).how);
  NIXL_TRY(job->fill(devices, plan, assignment));
  return job;
}

// For the copy engine, which takes host memory in pieces as it was page-locked.
void DeviceJob::add_direct(Part& part, const Plan& plan, const Piece& piece, std::uint64_t delta) {
  const std::uint64_t far = piece.remote + delta;
  for (std::uint64_t at = 0, bytes; at < piece.length; at += bytes) {
    bytes = piece.length - at;
    if (host_) {
      const bool near_host = plan.local_kind == MemKind::kDram;
      bytes = std::min(bytes, host_->bytes_from(near_host ? piece.local_region : piece.remote_region,
                                                near_host ? piece.local + at : far + at));
    }
    std::uint64_t to = far + at, from = piece.local + at;
    if (plan.op == Op::kRead) std::swap(to, from);
    part.direct.push_back({reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes});
  }
}

Result<void> DeviceJob::fill(Devices& devices, const Plan& plan, const Assignment& assignment) {
  std::vector<int> ordinals = assignment.device_of;
  std::sort(ordinals.begin(), ordinals.end());
  ordinals.erase(std::unique(ordinals.begin(), ordinals.end()), ordinals.end());
  const bool engine = plan.num_blocks <= kFewPieces ||
                      (plan.num_blocks <= kEnginePieces && plan.total_bytes >= plan.num_blocks * kEngineBytes);
  const std::uint32_t max_blocks = devices.blocks(host_.has_value());
  const std::uint64_t shares = std::uint64_t{max_blocks} * (kThreadsPerBlock / 32) * kItemsPerWarp;
  const std::uint64_t item =
      engine ? ~std::uint64_t{0}
             : std::clamp((plan.total_bytes / shares + kMinItem - 1) / kMinItem * kMinItem, kMinItem, kMaxItem);
  const Count count = engine ? Count{0, false} : count_items(plan, item);
  for (const int ordinal : ordinals) {
    NIXL_ASSIGN(const auto deltas, deltas_of(plan, assignment, ordinal));
    NIXL_ASSIGN(auto device, devices.at(ordinal));
    const cudaStream_t stream = device->next_stream();
    NIXL_ASSIGN(auto list, PinnedList::create(devices, std::move(device), count.items, max_blocks));
    parts_.push_back(Part{std::move(list), {}, stream});
    Part& part = parts_.back();
    if (count.one_a_row && ordinals.size() == 1) {
      part.list.add_rows(plan, deltas);
      continue;
    }
    for (PlanCursor cursor(plan); !cursor.at_end();) {
      const Piece piece = cursor.next(item);
      if (ordinals.size() > 1 && assignment.at(piece) != ordinal) continue;
      if (engine) {
        add_direct(part, plan, piece, deltas[piece.remote_region]);
        continue;
      }
      std::uint64_t to = piece.remote + deltas[piece.remote_region], from = piece.local;
      if (plan.op == Op::kRead) std::swap(to, from);
      part.list.add(to, from, static_cast<std::uint32_t>(piece.length));
    }
  }
  return {};
}

Result<void> DeviceJob::start() {
  std::lock_guard lock(mutex_);
  error_.reset();
  abandoned_.store(false, std::memory_order_relaxed);
  asked_at_ = now_ns();
  running_.store(true, std::memory_order_release);
  Result<void> result;
  for (Part& part : parts_) {
    const DeviceScope scope(part.list.device().ordinal());
    for (const Direct& piece : part.direct)
      if (const auto code =
              ::cudaMemcpyAsync(piece.destination, piece.source, piece.bytes, cudaMemcpyDefault, part.stream);
          code != cudaSuccess && result)
        result = cuda_error("cudaMemcpyAsync", code);
    if (result) result = part.direct.empty() ? part.list.launch(part.stream) : part.list.signal(part.stream);
    if (!result) break;
  }
  if (!result) {
    // What was started on other devices is waited for, so that nothing moves after the error was told.
    for (Part& part : parts_) ::cudaStreamSynchronize(part.stream);
    running_.store(false, std::memory_order_release);
  }
  return result;
}

bool DeviceJob::look() {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return false;
  if (!running()) return true;
  if (std::all_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.list.done(); })) {
    Result<void> end = ending.peer().check_alive(true);
    if (abandoned_.load(std::memory_order_acquire)) end = fail(Code::kCancelled, "cancelled by the caller");
    if (end && host_) end = host_->check_mapped();
    if (end) end = ending.finish();
    finish(end ? std::nullopt : std::optional<Error>(std::move(end).error()));
    return true;
  }
  const Nanoseconds now = now_ns();
  if (now - asked_at_ < kAskStreamEvery) return false;
  asked_at_ = now;
  for (Part& part : parts_) {
    const DeviceScope scope(part.list.device().ordinal());
    if (const auto code = ::cudaStreamQuery(part.stream); code != cudaSuccess && code != cudaErrorNotReady) {
      finish(cuda_error("the copy by a GPU", code).value());
      return true;
    }
  }
  return false;
}

void DeviceJob::finish(std::optional<Error> error) {
  error_ = std::move(error);
  running_.store(false, std::memory_order_release);
}

Result<TransferState> DeviceTransfer::submit(std::optional<std::string_view> message) {
  NIXL_TRY(job_->ending.peer().check_alive());
  NIXL_TRY(job_->ending.check_all_registered());
  job_->ending.set_message(message);
  NIXL_TRY(job_->start());
  entered_(job_);
  return TransferState::kRunning;
}

Result<TransferState> DeviceTransfer::poll() {
  if (job_->running() && !job_->look()) return TransferState::kRunning;
  if (job_->running()) return TransferState::kRunning;
  if (job_->error()) return fail(*job_->error());
  return TransferState::kDone;
}

bool DeviceTransfer::cancel() noexcept {
  if (!job_->running()) return true;
  job_->abandon();
  return job_->look() && !job_->running();
}

}  // namespace nixl::core::samehost
