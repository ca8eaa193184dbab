#include "ep/cpu/cpu_path.h"

#include <algorithm>

namespace nixl::core::ep {

namespace {

using nixl::ep::Phase;

// Operations are told apart by their outputs: a receive phase belongs to the send phase that was given the same ones.
bool same_call(const Dispatch& a, const Dispatch& b) {
  return a.recv_x == b.recv_x && a.src_info == b.src_info && a.num_tokens == b.num_tokens && a.hidden == b.hidden &&
         a.max_tokens == b.max_tokens && a.num_ranks == b.num_ranks && a.payload == b.payload &&
         (a.recv_weights == nullptr) == (b.recv_weights == nullptr);
}
bool same_call(const CombineArgs& a, const CombineArgs& b) {
  return a.out == b.out && a.num_tokens == b.num_tokens && a.hidden == b.hidden && a.max_tokens == b.max_tokens &&
         a.num_ranks == b.num_ranks && a.sends_only == b.sends_only && a.zero_copy == b.zero_copy &&
         (a.recv_weights == nullptr) == (b.recv_weights == nullptr);
}

Result<void> no_such_call(const char* verb) {
  return fail(Code::kNotAllowed,
              "no such %s waits for its receive phase: it ran already, or the next operation began; call a hook once, "
              "before the next operation",
              verb);
}

}  // namespace

// Marks that a phase runs, so that detach waits for it.
class CpuPath::RunningPhase {
 public:
  explicit RunningPhase(PeerTable& peers) : peers_(peers) { peers_.begin_phase(); }
  ~RunningPhase() { peers_.end_phase(); }
  RunningPhase(const RunningPhase&) = delete;
  RunningPhase& operator=(const RunningPhase&) = delete;

 private:
  PeerTable& peers_;
};

Result<std::unique_ptr<Path>> CpuPath::open(const PathOptions& options) {
  auto path = std::make_unique<CpuPath>(options);
  NIXL_TRY(path->own_.open(options.rank, options.incarnation));
  return path;
}

CpuPath::CpuPath(const PathOptions& options)
    : options_(options),
      fault_words_(kMaxRanks, 0),
      peers_(options.rank, own_),
      exchange_(Channel::kOperations, options.rank, options.incarnation, Timing{options.timeout_ns}, own_, peers_,
                fault_words_.data()),
      barrier_(Channel::kBarriers, options.rank, options.incarnation, Timing{options.timeout_ns}, own_, peers_,
               fault_words_.data()),
      combiner_(options.combine) {}

CpuPath::~CpuPath() {
  (void)close();
}

Result<void> CpuPath::reserve(const Capacity& capacity) {
  std::lock_guard lock(memory_mutex_);
  if (pending_ != Pending::kNone)
    return fail(Code::kBusy, "operation %llu is between its phases: finish it first",
                static_cast<unsigned long long>(operations_));
  NIXL_TRY(own_.reserve(capacity));
  capacity_ = capacity;
  return {};
}

Result<Export> CpuPath::export_memory() {
  std::lock_guard lock(memory_mutex_);
  return own_.export_memory();
}

Result<void> CpuPath::attach(const PeerIdentity& peer, Export memory) {
  NIXL_TRY(check_open());
  return peers_.attach(peer, std::move(memory));
}

Result<void> CpuPath::detach(int rank) {
  return peers_.detach(rank);
}

Result<void> CpuPath::set_mask(std::span<const int> ranks, bool masked, void*) {
  return peers_.set_mask(ranks, masked);
}

Result<void> CpuPath::query_masks(std::int32_t* out, void*) const {
  std::lock_guard lock(memory_mutex_);
  peers_.query_masks(out, capacity_.num_ranks);
  return {};
}

Result<void> CpuPath::check_open() const {
  if (closed_.load(std::memory_order_acquire)) return fail(Code::kNotAllowed, "the buffer was destroyed");
  if (capacity_.num_ranks == 0) return fail(Code::kNotAllowed, "no memory yet: update_memory comes first");
  return {};
}

Setting CpuPath::setting() const {
  return Setting{options_.rank, capacity_, &own_, &exchange_, &errors_};
}

void CpuPath::begin_operation(Phase phase, int num_ranks) {
  std::fill(fault_words_.begin(), fault_words_.end(), 0);
  lent_ = false;
  exchange_.begin(++operations_, phase, num_ranks);
}

// A receive phase that nobody asked for: its peers have sent, so it is waited for and thrown away.
void CpuPath::finish_pending() {
  if (pending_ == Pending::kNone) return;
  exchange_.gather(pending_ == Pending::kDispatch ? WaitSite::kDispatch : WaitSite::kCombineRows, nullptr);
  (void)exchange_.verify();  // tells the senders that they may go on
  pending_ = Pending::kNone;
}

Result<void> CpuPath::send(const Dispatch& args) {
  NIXL_TRY(check_open());
  finish_pending();
  begin_operation(Phase::kDispatch, args.num_ranks);
  NIXL_TRY(dispatcher_.send(setting(), args));
  sent_dispatch_ = args;
  pending_ = Pending::kDispatch;
  return {};
}

Result<void> CpuPath::recv(const Dispatch& args) {
  if (pending_ != Pending::kDispatch || !same_call(args, sent_dispatch_)) return no_such_call("dispatch");
  pending_ = Pending::kNone;
  return dispatcher_.recv(setting(), args);
}

Result<void> CpuPath::send(const CombineArgs& args) {
  NIXL_TRY(check_open());
  if (args.zero_copy && !lent_)
    return fail(
        Code::kNotAllowed,
        "a zero-copy combine takes its rows from get_next_combine_buffer(), which was not called since the last "
        "operation");
  NIXL_TRY(check_ranges(setting(), args));
  finish_pending();
  begin_operation(Phase::kCombine, args.num_ranks);
  NIXL_TRY(combiner_.send(setting(), args));
  sent_combine_ = args;
  pending_ = Pending::kCombine;
  return {};
}

Result<void> CpuPath::recv(const CombineArgs& args) {
  if (pending_ != Pending::kCombine || !same_call(args, sent_combine_)) return no_such_call("combine");
  NIXL_TRY(check_ranges(setting(), args));
  pending_ = Pending::kNone;
  return combiner_.recv(setting(), args);
}

Result<void> CpuPath::dispatch(const Dispatch& args) {
  RunningPhase phase(peers_);
  NIXL_TRY(send(args));
  return recv(args);
}

Result<void> CpuPath::dispatch_send(const Dispatch& args) {
  RunningPhase phase(peers_);
  return send(args);
}

Result<void> CpuPath::dispatch_recv(const Dispatch& args) {
  RunningPhase phase(peers_);
  NIXL_TRY(check_open());
  return recv(args);
}

Result<void> CpuPath::combine(const CombineArgs& args) {
  RunningPhase phase(peers_);
  NIXL_TRY(send(args));
  return recv(args);
}

Result<void> CpuPath::combine_send(const CombineArgs& args) {
  RunningPhase phase(peers_);
  return send(args);
}

Result<void> CpuPath::combine_recv(const CombineArgs& args) {
  RunningPhase phase(peers_);
  NIXL_TRY(check_open());
  return recv(args);
}

Result<void> CpuPath::barrier(void*) {
  RunningPhase phase(peers_);
  NIXL_TRY(check_open());
  barrier_.barrier(++operations_);
  return {};
}

Result<View> CpuPath::next_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks) {
  NIXL_TRY(check_open());
  const std::int64_t stride = zero_copy_row_stride(hidden);
  const std::int64_t rows = num_ranks * max_tokens;
  const int slot = exchange_.next_slot();
  own_.begin_stage(slot);  // the caller writes when it likes: nobody takes the slot for what it held before
  (void)own_.end_stage(slot);
  lent_ = true;
  View view;
  view.data = own_.slot(slot);
  view.shape[0] = capacity_.experts_per_rank;
  view.shape[1] = rows;
  view.shape[2] = hidden;
  view.stride[0] = rows * stride;
  view.stride[1] = stride;
  view.stride[2] = 1;
  return view;
}

View CpuPath::data_memory() const {
  return own_.exposed();
}

View CpuPath::fault_view() const {
  View view;
  view.data = const_cast<std::int32_t*>(fault_words_.data());
  view.shape[0] = capacity_.num_ranks;
  view.stride[0] = 1;
  return view;
}

std::vector<Fault> CpuPath::take_faults() {
  return peers_.take_faults();
}

std::string CpuPath::take_input_error() {
  return errors_.take();
}

Result<void> CpuPath::close() {
  closed_.store(true, std::memory_order_release);
  peers_.detach_all();
  return {};
}

Result<std::unique_ptr<Path>> open_cpu_path(const PathOptions& options) {
  return CpuPath::open(options);
}

}  // namespace nixl::core::ep
