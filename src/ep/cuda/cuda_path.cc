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
using nixl::ep::Combine;
using nixl::ep::Phase;

// Rows are read 16 bytes at a time.
std::int64_t zero_copy_stride(std::int64_t hidden) {
  return align_up<std::int64_t>(zero_copy_row_stride(hidden), 8);
}

// Clients zero the memory that is shown to them, each when it suits it. Slots take rows at any time: a faster peer's rows would be
// lost with them. So what is shown is memory apart, and little of it.
constexpr std::int64_t kExposedBytes = 2 << 20;

constexpr Nanoseconds kCloseGrace = 1'000'000'000;  // for operations under way when a rank closes

constexpr int kMaxExperts = 8192;         // a table of them lies in shared memory
constexpr std::int64_t kSmallBatch = 16;  // up to here rows travel unsummed: one hop instead of two
constexpr std::int64_t kFewSums = 64;     // up to here short pieces of sums

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
  if (options_.rank >= capacity.num_ranks)
    return fail(Code::kInvalidArgument, "num_ranks is %d; rank %d needs more", capacity.num_ranks, options_.rank);
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
  // Loads the small kernels too: the first launch of a kernel may not happen while another stream is captured.
  const gpu::PeerChange nothing{Change::kUnmask, options_.rank};
  NIXL_TRY(change_peers({&nothing, 1}, stream_));
  return cuda_check(cudaStreamSynchronize(stream_), "start of a rank");
}

// An operation's blocks may be placed while the kernel before it ends; they wait for its end before they touch memory.
Result<void> CudaPath::launch_operation(const void* kernel, int grid, int threads, std::int64_t shared, void* args,
                                        void* stream) {
  void* pointers[] = {args};
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  config.numAttrs = 1;
  return cuda_check(cudaLaunchKernelExC(&config, kernel, pointers), "launch of an operation");
}
Result<void> CudaPath::launch(const void* kernel, int grid, int threads, std::int64_t shared, void* args,
                              void* stream) {
  void* pointers[] = {args};
  return cuda_check(cudaLaunchKernel(kernel, dim3(grid), dim3(threads), pointers, static_cast<std::size_t>(shared),
                                     static_cast<cudaStream_t>(stream)),
                    "launch of a kernel");
}

int CudaPath::grid_for(std::int64_t items) const {
  return static_cast<int>(std::clamp<std::int64_t>(items, 2, num_blocks_));
}

Result<gpu::Op> CudaPath::op_of(int num_ranks, Phase phase, int parts) const {
  if (!state_) return fail(Code::kNotAllowed, "rank %d has no memory yet", options_.rank);
  if (closed_) return fail(Code::kNotAllowed, "the path of rank %d is closed", options_.rank);
  if (num_ranks <= options_.rank || num_ranks > capacity_.num_ranks)
    return fail(Code::kInvalidArgument, "the call covers %d ranks; %d to %d are allowed", num_ranks, options_.rank + 1,
                capacity_.num_ranks);
  gpu::Op op;
  op.state = state_;
  op.page = page_on_device_;
  op.data = data_.data();
  op.control = control_.data();
  op.layout = layout_;
  op.words = words_;
  op.timeout_ns = options_.timeout_ns;
  op.incarnation = options_.incarnation;
  op.rank = options_.rank;
  op.ranks = num_ranks;
  op.all_ranks = capacity_.num_ranks;
  op.experts = capacity_.experts_per_rank;
  op.by_experts = Divisor(static_cast<std::uint32_t>(op.experts));
  op.phase = static_cast<int>(phase);
  op.parts = parts;
  return op;
}

// Short pieces where latency counts, long ones where the link is full; both sides choose from the same numbers.
Result<RowShape> CudaPath::shape_of(std::int64_t row_bytes, std::int64_t tokens, int wanted_per, int chunk_words,
                                    int meta_words) const {
  const int first = tokens <= kSmallBatch ? std::min(2, wanted_per)
                    : tokens <= 64        ? std::min(4, wanted_per)
                    : tokens <= 128       ? std::min(7, wanted_per)
                                          : wanted_per;
  for (int per : {first, wanted_per}) {
    const RowShape shape = make_row_shape(row_bytes, per, chunk_words, meta_words, lanes_);
    if (shape.row_bytes * tokens + 16 * kMaxTopk * tokens <= layout_.slot_bytes) return shape;
    if (per == wanted_per && shape.row_bytes * tokens <= layout_.slot_bytes) return shape;
  }
  return fail(
      Code::kInvalidArgument, "%lld tokens of %lld bytes do not fit slots of %lld bytes: give update_memory more bytes",
      static_cast<long long>(tokens), static_cast<long long>(row_bytes), static_cast<long long>(layout_.slot_bytes));
}

// A receive kernel takes the newest operation for its own.
Result<void> CudaPath::check_turn(Phase phase, const void* output, int parts) const {
  if (parts != gpu::kReceives || (sent_ && sent_->phase == phase && sent_->output == output)) return {};
  return fail(Code::kNotAllowed,
              "no such %s waits for its receive phase: it ran already, or the next operation began; call a hook once, "
              "before the next operation",
              phase == Phase::kDispatch ? "dispatch" : "combine");
}

Result<void> CudaPath::dispatch_parts(const Dispatch& args, int parts) {
  const DeviceScope scope(device_);
  gpu::DispatchOp a;
  NIXL_ASSIGN(a.op, op_of(args.num_ranks, Phase::kDispatch, parts));
  if (!args.records) return fail(Code::kInvalidArgument, "records is null; its memory (record_bytes) is needed");
  NIXL_TRY(check_turn(Phase::kDispatch, args.recv_x, parts));
  const int payload = static_cast<int>(args.payload);
  a.route = {args.topk_idx, args.index_bytes, static_cast<int>(args.num_tokens), args.topk,
             static_cast<int>(args.max_tokens)};
  a.x = static_cast<const std::uint16_t*>(args.x);
  a.weights = args.topk_weights;
  a.with_weights = args.recv_weights != nullptr;
  a.hidden = static_cast<int>(args.hidden);
  a.payload = payload;
  a.row_bytes = static_cast<int>(row_bytes(payload, args.hidden));
  a.chunk_words = payload == kPayloadBf16 ? 0 : payload == kPayloadFp8Ue8m0 ? 1 : 4;
  a.scale_words = payload == kPayloadBf16 ? 0 : a.hidden / (payload == kPayloadFp8Ue8m0 ? 512 : 128);
  const int meta_words = 2 + args.topk * (a.with_weights ? 3 : 2);
  NIXL_ASSIGN(a.shape, shape_of(a.row_bytes, args.max_tokens, gpu::kDispatchPiece, a.chunk_words, meta_words));
  a.recv_x = static_cast<std::uint8_t*>(args.recv_x);
  a.recv_scales = static_cast<std::uint32_t*>(args.recv_scales);
  a.recv_count = args.recv_count;
  a.src_info = args.src_info;
  a.layout_range = args.layout_range;
  a.recv_weights = args.recv_weights;
  a.recv_places = args.recv_places;
  a.record = make_record_layout(args.max_tokens, args.topk, args.num_ranks);
  a.records = static_cast<std::uint8_t*>(args.records);
  last_experts_ = args.num_ranks * capacity_.experts_per_rank;
  last_tokens_ = static_cast<int>(args.max_tokens);
  a.recv_stats = args.recv_stats;
  a.wait_cost = args.wait_cost;
  const int grid =
      grid_for(std::max<std::int64_t>(args.num_tokens, args.max_tokens * args.num_ranks * a.shape.pieces / 4) + 1);
  const int most_ranks = std::min(args.num_ranks - 1, args.topk);
  const int at_once = std::max(1, gpu::kSenders / std::max(1, most_ranks));  // pieces that a block sends at once
  a.plan = gpu::plan_tokens(a.route.num_tokens, grid, (a.shape.pieces + at_once - 1) / at_once);
  a.shared = gpu::make_dispatch_shared(a);
  a.together = 32 / args.topk;
  const auto divisor = [](int by) { return Divisor(static_cast<std::uint32_t>(by)); };
  a.by_topk = divisor(args.topk);
  a.by_pieces = divisor(a.shape.pieces);
  a.by_others = divisor(args.num_ranks - 1);
  a.by_cells = divisor(a.op.words.cells);
  last_stream_ = args.stream;
  has_last_stream_ = true;
  NIXL_TRY(launch_operation(gpu::dispatch_kernel(lanes_), grid, gpu::kThreads, a.shared.total, &a, args.stream));
  sent_ = parts == gpu::kSends ? std::optional<Sent>({Phase::kDispatch, args.recv_x}) : std::nullopt;
  return {};
}

Result<void> CudaPath::combine_parts(const CombineArgs& args, int parts) {
  const DeviceScope scope(device_);
  gpu::CombineOp a;
  NIXL_ASSIGN(a.op, op_of(args.num_ranks, Phase::kCombine, parts));
  if (!args.records)
    return fail(
        Code::kInvalidArgument,
        "the handle lacks what dispatch recorded for its combines: pass the handle that dispatch returned, or at "
        "least its own src_info");
  NIXL_TRY(check_turn(Phase::kCombine, args.out, parts));
  a.route = {args.topk_idx, args.index_bytes, static_cast<int>(args.num_tokens), args.topk,
             static_cast<int>(args.max_tokens)};
  a.hidden = static_cast<int>(args.hidden);
  const bool weighted = args.sends_only && args.recv_weights;
  a.exact = options_.combine == Combine::kExact || (args.sends_only && !weighted);
  const bool few_rows = args.max_tokens <= kSmallBatch || args.topk <= gpu::kFewRows;  // hardly more bytes than sums
  const bool summed = !a.exact && (weighted || (!args.sends_only && !few_rows));
  const bool few = args.max_tokens <= (summed ? kFewSums : kSmallBatch);
  const RowsKind kind = args.max_tokens <= kSmallBatch ? RowsKind::kFewTokens
                        : args.topk <= gpu::kFewRows   ? RowsKind::kFewRows
                                                       : RowsKind::kMany;
  NIXL_ASSIGN(a.shape,
              shape_of(2 * args.hidden, args.max_tokens, summed ? gpu::sums_piece(few) : gpu::rows_piece(kind), 0, 0));
  a.units = gpu::plan_units(a.shape, gpu::unit_chunks(lanes_, few), args.num_ranks);
  a.by_pieces = Divisor(a.shape.pieces);
  a.by_others = Divisor(args.num_ranks - 1);
  if (summed && args.max_tokens * args.num_ranks * a.units.of_token > gpu::kMostItems)
    return fail(Code::kUnsupported, "%lld tokens of %d ranks in %u parts are more than a combine numbers: %lld in all",
                static_cast<long long>(args.max_tokens), args.num_ranks, a.units.of_token,
                static_cast<long long>(gpu::kMostItems));
  const std::int64_t all_rows = args.max_tokens * args.topk * a.shape.row_bytes;
  a.rows = summed ? gpu::Rows::kSummed : all_rows <= layout_.slot_bytes ? gpu::Rows::kInSlot : gpu::Rows::kByPlace;
  a.split = summed || args.max_tokens > kSmallBatch ? 1 : args.max_tokens > 4 ? 2 : 4;
  a.entries = args.max_tokens * a.shape.row_bytes;
  const std::int64_t cells = args.max_tokens * ((args.topk + 2) / 3) * 16;
  if (summed && a.entries + cells > layout_.slot_bytes)
    return fail(Code::kInvalidArgument,
                "%lld tokens with top-k %d do not fit slots of %lld bytes: give update_memory more bytes",
                static_cast<long long>(args.max_tokens), args.topk, static_cast<long long>(layout_.slot_bytes));
  if (a.rows == gpu::Rows::kByPlace && all_rows > layout_.exact_bytes)
    return fail(Code::kInvalidArgument,
                "%lld tokens with top-k %d do not fit the %lld bytes for unsummed rows: give update_memory more bytes",
                static_cast<long long>(args.max_tokens), args.topk, static_cast<long long>(layout_.exact_bytes));
  a.x = static_cast<const std::uint16_t*>(args.zero_copy ? zero_copy_.get() : args.x);
  a.x_stride = args.zero_copy ? zero_copy_stride(args.hidden) : args.hidden;
  if (!a.x) return fail(Code::kNotAllowed, "a combine without copy needs next_combine_buffer first");
  a.weights = args.topk_weights;
  a.row_weights = weighted ? args.recv_weights : nullptr;
  if (!summed && kind == RowsKind::kFewTokens) a.gathered = gpu::kGatheredPieces * 2 * kChunkBytes;
  a.record = make_record_layout(args.max_tokens, args.topk, args.num_ranks);
  a.records = static_cast<const std::uint8_t*>(args.records);
  a.out = static_cast<std::uint16_t*>(args.out);
  a.wait_cost = args.wait_cost;
  const std::int64_t rows = args.max_tokens * (summed ? args.num_ranks : args.topk);
  const int grid = grid_for(std::max<std::int64_t>(args.num_tokens, rows * a.shape.pieces / 4));
  const auto shared = gpu::make_combine_shared(a, grid);
  last_stream_ = args.stream;
  has_last_stream_ = true;
  const void* kernel = summed ? gpu::combine_sums_kernel(lanes_, few) : gpu::combine_rows_kernel(lanes_, kind);
  const int threads = summed ? gpu::kSumsThreads : gpu::rows_threads(kind);
  NIXL_TRY(launch_operation(kernel, grid, threads, shared.total, &a, args.stream));
  sent_ = parts == gpu::kSends ? std::optional<Sent>({Phase::kCombine, args.out}) : std::nullopt;
  return {};
}

Result<void> CudaPath::dispatch(const Dispatch& args) {
  return dispatch_parts(args, gpu::kSends | gpu::kReceives);
}
Result<void> CudaPath::dispatch_send(const Dispatch& args) {
  return dispatch_parts(args, gpu::kSends);
}
Result<void> CudaPath::dispatch_recv(const Dispatch& args) {
  return dispatch_parts(args, gpu::kReceives);
}
Result<void> CudaPath::combine(const CombineArgs& args) {
  return combine_parts(args, gpu::kSends | gpu::kReceives);
}
Result<void> CudaPath::combine_send(const CombineArgs& args) {
  return combine_parts(args, gpu::kSends);
}
Result<void> CudaPath::combine_recv(const CombineArgs& args) {
  return combine_parts(args, gpu::kReceives);
}

Result<void> CudaPath::barrier(void* stream) {
  if (sent_)
    return fail(Code::kNotAllowed, "a %s waits for its receive phase: call its hook before a barrier",
                sent_->phase == Phase::kDispatch ? "dispatch" : "combine");
  const DeviceScope scope(device_);
  NIXL_ASSIGN(gpu::Op op, op_of(capacity_.num_ranks, Phase::kBarrier, gpu::kSends | gpu::kReceives));
  last_stream_ = stream;
  has_last_stream_ = true;
  return launch_operation(gpu::barrier_kernel(), 1, 128, gpu::kPeerBytes * std::int64_t{op.ranks}, &op, stream);
}

Result<View> CudaPath::next_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks) {
  const std::lock_guard lock(mutex_);
  const DeviceScope scope(device_);
  const std::int64_t rows = max_tokens * num_ranks, stride = zero_copy_stride(hidden);
  const std::int64_t bytes = 2 * capacity_.experts_per_rank * rows * stride;
  if (bytes > zero_copy_bytes_) {
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    if (has_last_stream_) (void)cudaStreamIsCapturing(static_cast<cudaStream_t>(last_stream_.load()), &capturing);
    if (capturing != cudaStreamCaptureStatusNone)
      return fail(Code::kNotAllowed,
                  "the memory for a combine without copy is made at the first request, which cannot be inside a graph "
                  "capture: ask for it once before");
    void* memory = nullptr;
    NIXL_TRY(cuda_check(cudaMalloc(&memory, bytes), "allocate memory for a combine without copy"));
    zero_copy_.reset(memory, [device = device_](void* old) {
      const DeviceScope scope(device);
      (void)cudaFree(old);
    });
    zero_copy_bytes_ = bytes;
  }
  return View{zero_copy_.get(), {capacity_.experts_per_rank, rows, hidden}, {rows * stride, stride, 1}, zero_copy_};
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
