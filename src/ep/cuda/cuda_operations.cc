// Operations of the CUDA path: what a call asks for, turned into the arguments of one kernel, and its launch.
#include <algorithm>

#include "ep/cuda/cuda_path.h"
#include "ep/layout/layout.h"

namespace nixl::core::ep {
namespace {

using gpu::RowsKind;
using nixl::ep::Combine;
using nixl::ep::Phase;

constexpr std::int64_t kSmallBatch = 16;  // up to here rows travel unsummed: one hop instead of two
constexpr std::int64_t kFewSums = 64;     // up to here short pieces of sums

// Rows are read 16 bytes at a time.
std::int64_t zero_copy_stride(std::int64_t hidden) {
  return align_up<std::int64_t>(zero_copy_row_stride(hidden), 8);
}

// How a combine goes: whoever has the rows of a token sends their sum, or each of them.
struct CombineWay {
  bool exact = false;
  bool weighted = false;  // sums with the weights that came with the dispatch
  bool summed = false;
  bool few = false;  // tokens: short pieces
  RowsKind kind = RowsKind::kMany;
};
CombineWay combine_way(Combine wanted, const CombineArgs& args) {
  CombineWay way;
  way.weighted = args.sends_only && args.recv_weights;
  way.exact = wanted == Combine::kExact || (args.sends_only && !way.weighted);
  const bool few_rows = args.max_tokens <= kSmallBatch || args.topk <= gpu::kFewRows;  // hardly more bytes than sums
  way.summed = !way.exact && (way.weighted || (!args.sends_only && !few_rows));
  way.few = args.max_tokens <= (way.summed ? kFewSums : kSmallBatch);
  way.kind = args.max_tokens <= kSmallBatch ? RowsKind::kFewTokens
             : args.topk <= gpu::kFewRows   ? RowsKind::kFewRows
                                            : RowsKind::kMany;
  return way;
}

}  // namespace

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
  const auto [exact, weighted, summed, few, kind] = combine_way(options_.combine, args);
  a.exact = exact;
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

}  // namespace nixl::core::ep
