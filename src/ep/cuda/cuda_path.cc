#include "ep/cuda/cuda_path.h"

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <thread>

#include "base/env.h"
#include "base/log.h"
#include "ep/layout/layout.h"

namespace nixl::core::ep {
namespace {

using gpu::Change;
using gpu::PeerChange;
using gpu::RowsKind;
using gpu::State;
using nixl::ep::Phase;

// Clients zero the memory that is shown to them, each when it suits it. Slots take rows at any time: a faster peer's rows would be
// lost with them. So what is shown is memory apart, and little of it.
constexpr std::int64_t kExposedBytes = 2 << 20;

constexpr Nanoseconds kCloseGrace = 1'000'000'000;  // for operations under way when a rank closes

constexpr int kMaxExperts = 8192;  // a table of them lies in shared memory

// 128-byte lines arrive whole over NVLink; 16-byte cells are for GPUs joined by anything else, and for ranks that share one.
Result<int> lanes_from_environment() {
  NIXL_ASSIGN(const auto bytes, env_int("NIXL_EP_LINE_BYTES"));
  if (!bytes || *bytes == 128) return 8;
  if (*bytes == 16) return 1;
  return fail(Code::kInvalidArgument, "NIXL_EP_LINE_BYTES is %lld; 128 (NVLink) and 16 (anything) are allowed",
              static_cast<long long>(*bytes));
}

}  // namespace

std::string cuda_unavailable_reason() {
  auto driver = cuda_driver();
  return driver ? "" : driver.error().reason;
}

Result<std::unique_ptr<Path>> open_cuda_path(const PathOptions& options) {
  return CudaPath::open(options);
}

Result<std::unique_ptr<Path>> CudaPath::open(const PathOptions& options) {
  NIXL_TRY(cuda_driver().map([](const auto&) {}));
  if (!options.nvlink)
    return fail(Code::kUnsupported,
                "NVLink is disabled for this buffer and there is no path over a network in this build");
  std::unique_ptr<CudaPath> path(new CudaPath(options));
  NIXL_ASSIGN(path->lanes_, lanes_from_environment());
  NIXL_TRY(cuda_check(cudaGetDevice(&path->device_), "current CUDA device"));
  return path;
}

CudaPath::~CudaPath() {
  (void)close();
  const DeviceScope scope(device_);
  peers_.clear();
  if (state_) (void)cudaFree(state_);
  if (page_) (void)cudaFreeHost(page_);
  if (exposed_) (void)cudaFree(exposed_);
  if (event_) (void)cudaEventDestroy(event_);
  if (idle_stream_) (void)cudaStreamDestroy(idle_stream_);
  if (stream_) (void)cudaStreamDestroy(stream_);
}

Result<void> CudaPath::reserve(const Capacity& capacity) {
  const std::lock_guard lock(mutex_);
  if (closed_) return fail(Code::kNotAllowed, "the path of rank %d is closed", options_.rank);
  const std::int64_t experts = std::int64_t{capacity.num_ranks} * capacity.experts_per_rank;
  if (experts > kMaxExperts)
    return fail(Code::kUnsupported, "%lld experts in all; up to %d are supported", static_cast<long long>(experts),
                kMaxExperts);
  if (state_) {
    const PushLayout wanted = make_push_layout(capacity.num_bytes, experts);
    if (max_elements(capacity.num_bytes, experts) >
            max_elements(capacity_.num_bytes, std::int64_t{capacity_.num_ranks} * capacity_.experts_per_rank) &&
        wanted.slot_bytes > layout_.slot_bytes)
      return fail(Code::kNotAllowed,
                  "more bytes for each token need a new buffer: slots of %lld bytes are there, %lld are needed",
                  static_cast<long long>(layout_.slot_bytes), static_cast<long long>(wanted.slot_bytes));
    const DeviceScope scope(device_);
    NIXL_TRY(data_.grow(layout_.total(capacity.num_ranks)));
    capacity_ = capacity;
    return {};
  }
  NIXL_TRY(cuda_check(cudaGetDevice(&device_), "current CUDA device"));
  capacity_ = capacity;
  const DeviceScope scope(device_);
  return allocate();
}

Result<void> CudaPath::allocate() {
  const std::int64_t experts = std::int64_t{capacity_.num_ranks} * capacity_.experts_per_rank;
  layout_ = make_push_layout(capacity_.num_bytes, experts);
  words_ = make_push_control(capacity_.experts_per_rank, kMaxRanks);
  NIXL_ASSIGN(control_, DeviceSpan::reserve(device_, words_.total));
  NIXL_TRY(control_.grow(words_.total));
  NIXL_ASSIGN(data_, DeviceSpan::reserve(device_, layout_.total(kMaxRanks)));
  NIXL_TRY(data_.grow(layout_.total(capacity_.num_ranks)));
  NIXL_TRY(cuda_check(cudaMalloc(reinterpret_cast<void**>(&state_), sizeof(State)), "allocate the state of a rank"));
  exposed_bytes_ = std::min(capacity_.num_bytes, kExposedBytes);
  NIXL_TRY(cuda_check(cudaMalloc(&exposed_, static_cast<std::size_t>(exposed_bytes_)),
                      "allocate the memory shown to clients"));
  NIXL_TRY(cuda_check(cudaMemset(exposed_, 0, static_cast<std::size_t>(exposed_bytes_)),
                      "zero the memory shown to clients"));
  auto initial = std::make_unique<State>();
  std::memset(static_cast<void*>(initial.get()), 0, sizeof(State));
  for (auto& versions : initial->peers) versions[0] = versions[1] = PeerVersion{};
  for (PeerCells& cells : initial->newest) cells = cells_of(PeerVersion{}, 0);
  PeerVersion& own = initial->peers[options_.rank][0];
  own.from = 0;
  own.data = data_.data();
  own.control = control_.data();
  own.status = PeerStatus::kActive;
  own.incarnation = options_.incarnation;
  own.sent = own.expected = 1;
  initial->newest[options_.rank] = cells_of(own, 0);
  NIXL_TRY(cuda_check(cudaMemcpy(state_, initial.get(), sizeof(State), cudaMemcpyHostToDevice),
                      "write the state of a rank"));
  NIXL_TRY(cuda_check(cudaHostAlloc(reinterpret_cast<void**>(&page_), sizeof(gpu::HostPage),
                                    cudaHostAllocMapped | cudaHostAllocPortable),
                      "allocate pinned memory for faults"));
  std::memset(static_cast<void*>(page_), 0, sizeof(gpu::HostPage));
  NIXL_TRY(
      cuda_check(cudaHostGetDevicePointer(reinterpret_cast<void**>(&page_on_device_), page_, 0), "map pinned memory"));
  NIXL_TRY(cuda_check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "create a stream"));
  NIXL_TRY(cuda_check(cudaStreamCreateWithFlags(&idle_stream_, cudaStreamNonBlocking), "create a stream"));
  NIXL_TRY(cuda_check(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "create an event"));
  cudaDeviceProp properties;  // asked for once: it takes milliseconds
  NIXL_TRY(cuda_check(cudaGetDeviceProperties(&properties, device_), "properties of the GPU"));
  gpu_.assign(properties.uuid.bytes, sizeof(properties.uuid.bytes));
  NIXL_TRY(prepare_kernels());
  // Loads the small kernels too: the first launch of a kernel may not happen while another stream is captured.
  const gpu::PeerChange nothing{Change::kUnmask, options_.rank};
  NIXL_TRY(change_peers({&nothing, 1}, stream_));
  return cuda_check(cudaStreamSynchronize(stream_), "start of a rank");
}

// How many blocks run at once, and all shared memory there is for each of the operations.
Result<void> CudaPath::prepare_kernels() {
  int processors = 0, most_shared = 0;
  NIXL_TRY(cuda_check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_),
                      "number of multiprocessors"));
  NIXL_TRY(cuda_check(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_),
                      "shared memory of a block"));
  num_blocks_ = std::max(2, options_.max_blocks > 0 ? std::min(options_.max_blocks, processors) : processors);
  for (const void* kernel :
       {gpu::dispatch_kernel(lanes_), gpu::combine_sums_kernel(lanes_, true), gpu::combine_sums_kernel(lanes_, false),
        gpu::combine_rows_kernel(lanes_, RowsKind::kFewTokens), gpu::combine_rows_kernel(lanes_, RowsKind::kFewRows),
        gpu::combine_rows_kernel(lanes_, RowsKind::kMany), gpu::barrier_kernel()}) {
    cudaFuncAttributes found;
    NIXL_TRY(cuda_check(cudaFuncGetAttributes(&found, kernel), "kernels for this GPU (sm_90 and newer are built)"));
    NIXL_TRY(cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             most_shared - static_cast<int>(found.sharedSizeBytes)),
                        "shared memory of a kernel"));
  }
  return {};
}

View CudaPath::data_memory() const {
  const std::lock_guard lock(mutex_);
  return View{exposed_, {exposed_bytes_, 0, 0}, {1, 0, 0}, nullptr};
}
View CudaPath::fault_view() const {
  return View{state_ ? state_->fault_view : nullptr, {capacity_.num_ranks, 0, 0}, {1, 0, 0}, nullptr};
}

std::vector<Fault> CudaPath::take_faults() {
  const std::lock_guard lock(faults_mutex_);
  std::vector<Fault> faults;
  if (!page_) return faults;
  const unsigned long long written = __atomic_load_n(&page_->faults, __ATOMIC_ACQUIRE);
  if (written - faults_taken_ > gpu::kFaultRing) faults_taken_ = written - gpu::kFaultRing;  // the oldest are lost
  for (; faults_taken_ < written; ++faults_taken_) {
    const gpu::FaultRecord& record = page_->ring[faults_taken_ % gpu::kFaultRing];
    faults.push_back({record.rank, record.operation, static_cast<Phase>(record.phase), record.expected, record.seen});
    NIXL_WARN("NIXL-EP timeout: rank %d waited for rank %d in operation %llu (phase %d) and masked it", options_.rank,
              record.rank, static_cast<unsigned long long>(record.operation), record.phase);
  }
  return faults;
}

std::string CudaPath::take_input_error() {
  if (!page_) return "";
  const unsigned long long found = __atomic_exchange_n(&page_->input_error, 0ull, __ATOMIC_ACQ_REL);
  if (found == 0) return "";
  const unsigned long long what = found - 1;
  char text[200];
  if ((what & 255) == gpu::kOutsideId)
    std::snprintf(text, sizeof(text),
                  "a top-k id of token %llu is outside the %d experts of the call; its entry was dropped", what >> 8,
                  last_experts_.load());
  else
    std::snprintf(text, sizeof(text),
                  "expert %llu was selected more than %d times by this rank; rows past that were dropped", what >> 8,
                  last_tokens_.load());
  return text;
}

// Until the operations queued so far have sent all that peers wait for, or the deadline: those that were queued in the stream last
// used, and those that graphs have begun elsewhere.
Result<void> CudaPath::let_operations_end(Deadline end) {
  const auto pause = [] { std::this_thread::sleep_for(std::chrono::microseconds(50)); };
  NIXL_TRY(follow_operations(idle_stream_));
  while (cudaStreamQuery(idle_stream_) == cudaErrorNotReady && !end.passed()) pause();
  (void)cudaGetLastError();  // not ready is no error
  for (;;) {
    struct {
      gpu::Ticket tickets[gpu::kTicketWords];
      gpu::Ended ended[gpu::kTicketWords];
    } now;
    static_assert(offsetof(State, tickets) == 0 && offsetof(State, ended) == offsetof(decltype(now), ended));
    NIXL_TRY(cuda_check(cudaMemcpyAsync(&now, state_, sizeof(now), cudaMemcpyDeviceToHost, stream_),
                        "read how far operations are"));
    NIXL_TRY(cuda_check(cudaStreamSynchronize(stream_), "read how far operations are"));
    std::uint64_t begun = 0;
    for (const gpu::Ticket& ticket : now.tickets)
      begun = std::max(begun, gpu::operations_begun(ticket.word + gpu::kTicket - 1));
    std::uint64_t sent = 0;
    for (const gpu::Ended& ended : now.ended) sent += ended.both + ended.sending;
    if (sent / gpu::kTicket >= begun || end.passed()) return {};
    pause();
  }
}

// Peers count on what the operations under way send, so these may end by themselves; not for long, since a peer may be dead.
Result<void> CudaPath::close() {
  const std::lock_guard lock(mutex_);
  if (closed_) return {};
  closed_ = true;
  if (!state_) return {};
  const DeviceScope scope(device_);
  (void)let_operations_end(Deadline::after(std::min(options_.timeout_ns, kCloseGrace)));  // their stream may be gone
  std::vector<PeerChange> changes;
  for (const auto& peer : peers_) changes.push_back({Change::kMask, peer.first});
  NIXL_TRY(change_apart(changes));
  NIXL_TRY(cuda_check(cudaDeviceSynchronize(), "operations of a closing rank"));
  peers_.clear();
  kept_.clear();
  return {};
}

}  // namespace nixl::core::ep
