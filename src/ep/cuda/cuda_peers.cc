// Peers of the CUDA path: what is exported of this rank and mapped of others, and changes of who takes part.
#include <algorithm>

#include "base/bytes.h"
#include "base/log.h"
#include "ep/cuda/cuda_path.h"

namespace nixl::core::ep {
namespace {

using gpu::Change;
using gpu::PeerChange;

constexpr std::uint32_t kExportMagic = 0x31706567;  // "gep1"

}  // namespace

Result<Export> CudaPath::export_memory() {
  const std::lock_guard lock(mutex_);
  if (!state_) return fail(Code::kNotAllowed, "rank %d has no memory to export yet", options_.rank);
  const DeviceScope scope(device_);
  unsigned long long ticket = 0;
  NIXL_TRY(
      cuda_check(cudaMemcpyAsync(&ticket, &state_->tickets[0].word, sizeof(ticket), cudaMemcpyDeviceToHost, stream_),
                 "read the number of operations"));
  NIXL_TRY(cuda_check(cudaStreamSynchronize(stream_), "read the number of operations"));
  first_count_ = first_count(gpu::operations_begun(ticket));
  ByteWriter out;
  out.put_all(kExportMagic, static_cast<std::uint32_t>(lanes_));
  out.put_text(gpu_);
  out.put_all(first_count_, static_cast<std::uint64_t>(layout_.slot_bytes),
              static_cast<std::uint64_t>(layout_.exact_bytes), static_cast<std::uint32_t>(words_.cells));
  Export result;
  for (const DeviceSpan* span : {&control_, &data_}) {
    const auto bytes = span->chunk_bytes();
    out.put(static_cast<std::uint32_t>(bytes.size()));
    for (std::int64_t size : bytes) out.put(static_cast<std::uint64_t>(size));
    NIXL_ASSIGN(auto descriptors, span->export_chunks());
    for (Fd& descriptor : descriptors) result.descriptors.push_back(std::move(descriptor));
  }
  result.description = out.take();
  return result;
}

Result<CudaPath::Announcement> CudaPath::read_announcement(int rank, std::string_view description) const {
  Announcement said;
  ByteReader in(description);
  NIXL_ASSIGN(const auto magic, in.get<std::uint32_t>());
  if (magic != kExportMagic)
    return fail(Code::kMismatch, "rank %d is on another kind of device or another version", rank);
  NIXL_ASSIGN(const auto lanes, in.get<std::uint32_t>());
  NIXL_ASSIGN(const auto gpu, in.get_text(64));
  said.gpu = gpu;
  NIXL_ASSIGN(said.first_count, in.get<std::uint32_t>());
  NIXL_ASSIGN(const auto slot_bytes, in.get<std::uint64_t>());
  NIXL_ASSIGN(const auto exact_bytes, in.get<std::uint64_t>());
  NIXL_ASSIGN(const auto cells, in.get<std::uint32_t>());
  if (lanes != static_cast<std::uint32_t>(lanes_) || slot_bytes != static_cast<std::uint64_t>(layout_.slot_bytes) ||
      exact_bytes != static_cast<std::uint64_t>(layout_.exact_bytes) ||
      cells != static_cast<std::uint32_t>(words_.cells))
    return fail(
        Code::kMismatch,
        "rank %d has lines of %u lanes and slots of %llu bytes, rank %d of %d and %lld: all ranks need the same "
        "NIXL_EP_LINE_BYTES, experts per rank and num_rdma_bytes",
        rank, lanes, static_cast<unsigned long long>(slot_bytes), options_.rank, lanes_,
        static_cast<long long>(layout_.slot_bytes));
  if (lanes_ != 1 && said.gpu == gpu_)
    return fail(Code::kUnsupported, "ranks %d and %d share one GPU: set NIXL_EP_LINE_BYTES=16 on all ranks", rank,
                options_.rank);
  const std::int64_t needed[2] = {words_.total, layout_.total(options_.rank + 1)};
  for (int part = 0; part < 2; ++part) {
    NIXL_ASSIGN(const auto count, in.get<std::uint32_t>());
    if (count > kMaxRanks) return fail(Code::kMismatch, "rank %d announces %u chunks", rank, count);
    std::int64_t total = 0;
    for (std::uint32_t i = 0; i < count; ++i) {
      NIXL_ASSIGN(const auto size, in.get<std::uint64_t>());
      if (size > (1ull << 44))
        return fail(Code::kMismatch, "rank %d announces a chunk of %llu bytes", rank,
                    static_cast<unsigned long long>(size));
      said.chunks[part].push_back(static_cast<std::int64_t>(size));
      total += said.chunks[part].back();
    }
    if (total < needed[part])
      return fail(Code::kMismatch,
                  "rank %d has %lld bytes where rank %d needs %lld: has it grown to the same number of ranks?", rank,
                  static_cast<long long>(total), options_.rank, static_cast<long long>(needed[part]));
  }
  return said;
}

Result<CudaPath::PeerMapping> CudaPath::map_peer(int rank, const Announcement& said,
                                                 std::vector<Fd> descriptors) const {
  PeerMapping mapping;
  std::size_t next = 0;
  for (int part = 0; part < 2; ++part) {
    DeviceSpan& span = part == 0 ? mapping.control : mapping.data;
    std::int64_t total = 0;
    for (std::int64_t size : said.chunks[part]) total += size;
    NIXL_ASSIGN(span, DeviceSpan::reserve(device_, total));
    for (std::int64_t size : said.chunks[part]) {
      if (next >= descriptors.size())
        return fail(Code::kMismatch, "rank %d sent %zu descriptors, more are announced", rank, next);
      NIXL_TRY(span.map(std::move(descriptors[next++]), size));
    }
  }
  return mapping;
}

// Lines and cells of an earlier process with this rank's id: its tags are no part of the order of the new one's.
Result<void> CudaPath::forget_source(int rank) {
  std::uint8_t* counts = control_.data() + words_.counts_of(rank, 0);
  NIXL_TRY(cuda_check(
      cudaMemsetAsync(counts, 0, static_cast<std::size_t>(words_.counts_of(rank + 1, 0) - words_.counts_of(rank, 0)),
                      stream_),
      "clear counts of an earlier connection"));
  std::uint8_t* slots = data_.data() + layout_.slot_of(rank, 0);
  return cuda_check(
      cudaMemsetAsync(slots, 0, static_cast<std::size_t>(layout_.slot_of(rank + 1, 0) - layout_.slot_of(rank, 0)),
                      stream_),
      "clear rows of an earlier connection");
}

// The mapping, which takes milliseconds, is made without the lock: masks and faults are not held up by it.
Result<void> CudaPath::attach(const PeerIdentity& peer, Export memory) {
  {
    const std::lock_guard lock(mutex_);
    if (!state_ || closed_) return fail(Code::kNotAllowed, "rank %d has no memory", options_.rank);
    if (peer.rank < 0 || peer.rank >= capacity_.num_ranks || peer.rank == options_.rank)
      return fail(Code::kInvalidArgument, "rank %d cannot be attached to rank %d of %d", peer.rank, options_.rank,
                  capacity_.num_ranks);
    if (peers_.count(peer.rank)) return fail(Code::kNotAllowed, "rank %d is attached already", peer.rank);
  }
  const DeviceScope scope(device_);
  NIXL_ASSIGN(const Announcement said, read_announcement(peer.rank, memory.description));
  NIXL_ASSIGN(PeerMapping mapping, map_peer(peer.rank, said, std::move(memory.descriptors)));
  const std::lock_guard lock(mutex_);
  if (closed_) return fail(Code::kNotAllowed, "the path of rank %d is closed", options_.rank);
  NIXL_TRY(forget_source(peer.rank));
  const PeerChange change{Change::kAttach,  peer.rank,    mapping.data.data(), mapping.control.data(),
                          peer.incarnation, first_count_, said.first_count};
  const auto& attached = peers_.emplace(peer.rank, std::move(mapping));
  if (auto changed = change_apart({&change, 1}); !changed) {
    kept_.push_back(std::move(attached.first->second));  // kernels may know it
    peers_.erase(attached.first);
    return changed;
  }
  return {};
}

// Why the memory may be unmapped at the end is said at await_idle (control.cu).
Result<void> CudaPath::detach(int rank) {
  const DeviceScope scope(device_);
  const std::int64_t limit_ns = 4 * options_.timeout_ns + 5'000'000'000;
  {
    const std::lock_guard lock(mutex_);
    if (!peers_.count(rank)) return fail(Code::kNotFound, "rank %d is not attached", rank);
    const PeerChange change{Change::kDetach, rank};
    NIXL_TRY(change_apart({&change, 1}));
    NIXL_TRY(follow_operations(idle_stream_));
    __atomic_store_n(&page_->idle[rank], 0, __ATOMIC_RELEASE);
    gpu::IdleOp idle{state_, limit_ns, &page_on_device_->idle[rank]};
    NIXL_TRY(launch(gpu::idle_kernel(), 1, 1, 0, &idle, idle_stream_));
  }
  auto waited = cuda_check(cudaStreamSynchronize(idle_stream_), "operations that may use a peer's memory");
  const std::lock_guard lock(mutex_);
  const auto found = peers_.find(rank);
  if (found == peers_.end()) return waited;  // closed meanwhile
  PeerMapping mapping = std::move(found->second);
  peers_.erase(found);
  if (waited && __atomic_load_n(&page_->idle[rank], __ATOMIC_ACQUIRE) != 0) return {};
  kept_.push_back(std::move(mapping));
  if (!waited) return waited;
  return fail(Code::kTimeout,
              "operations that use the memory of rank %d have not ended after %lld ms; it stays mapped until this "
              "buffer is destroyed",
              rank, static_cast<long long>(limit_ns / 1'000'000));
}

// Changes without a stream take effect after the operations that were queued so far, as far as this can be told.
Result<void> CudaPath::follow_operations(cudaStream_t stream) {
  if (!has_last_stream_) return {};
  const auto last = static_cast<cudaStream_t>(last_stream_.load());
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(last, &capturing) != cudaSuccess || capturing != cudaStreamCaptureStatusNone) {
    (void)cudaGetLastError();
    return {};
  }
  NIXL_TRY(cuda_check(cudaEventRecord(event_, last), "record an event behind the operations"));
  return cuda_check(cudaStreamWaitEvent(stream, event_, 0), "wait for an event");
}
Result<void> CudaPath::change_apart(std::span<const PeerChange> changes) {
  NIXL_TRY(change_peers(changes, stream_));
  return cuda_check(cudaStreamSynchronize(stream_), "change of peers");
}

Result<void> CudaPath::change_peers(std::span<const PeerChange> changes, cudaStream_t stream) {
  for (std::size_t begin = 0; begin < changes.size(); begin += gpu::kChangesInLaunch) {
    gpu::ChangeOp op;
    op.state = state_;
    op.control = control_.data();
    op.words = words_;
    op.all_ranks = capacity_.num_ranks;
    op.count = static_cast<int>(std::min<std::size_t>(gpu::kChangesInLaunch, changes.size() - begin));
    std::copy_n(changes.begin() + static_cast<std::ptrdiff_t>(begin), op.count, op.changes);
    NIXL_TRY(launch(gpu::change_kernel(), 1, 1, 0, &op, stream));
  }
  return {};
}

Result<void> CudaPath::set_mask(std::span<const int> ranks, bool masked, void* stream) {
  const std::lock_guard lock(mutex_);
  if (!state_) return fail(Code::kNotAllowed, "rank %d has no memory", options_.rank);
  const DeviceScope scope(device_);
  std::vector<PeerChange> changes;
  for (int rank : ranks) {
    if (rank == options_.rank) continue;
    if (!peers_.count(rank)) {
      if (masked) continue;
      return fail(Code::kNotAllowed, "rank %d is not connected; connect it first", rank);
    }
    changes.push_back({masked ? Change::kMask : Change::kUnmask, rank});
  }
  if (stream) return change_peers(changes, static_cast<cudaStream_t>(stream));
  NIXL_TRY(follow_operations(stream_));
  return change_apart(changes);
}

Result<void> CudaPath::query_masks(std::int32_t* out, void* stream) const {
  if (!state_) return fail(Code::kNotAllowed, "rank %d has no memory", options_.rank);
  const DeviceScope scope(device_);
  gpu::QueryOp op{state_, out, options_.rank, capacity_.num_ranks};
  return const_cast<CudaPath*>(this)->launch(gpu::query_kernel(), 1, 256, 0, &op, stream);
}

}  // namespace nixl::core::ep
