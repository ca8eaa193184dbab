// The face of ep.h: one path and one group put together.
#include <sys/random.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <set>

#include "base/fork.h"
#include "contract/store.h"
#include "ep/arguments.h"
#include "ep/default_store.h"
#include "ep/group/group.h"
#include "ep/layout/push.h"
#include "ep/layout/shape.h"
#include "ep/path.h"
#include "nixl/ep.h"

namespace nixl::core::ep {
namespace {
std::atomic<OpenDefaultStore> default_store{nullptr};
}
void set_default_store(OpenDefaultStore open) noexcept {
  default_store = open;
}
}  // namespace nixl::core::ep

namespace nixl::ep {
namespace {

using core::Code;
using core::fail;
using core::Result;
namespace inner = core::ep;

constexpr core::Nanoseconds kMs = 1'000'000;

// In nanoseconds; deadlines are sums of a few of them, so 31 years, the longest, are far from overflowing.
core::Nanoseconds limit_of(std::int64_t milliseconds) {
  constexpr std::int64_t kLongestMs = 1'000'000'000'000;
  return std::min(milliseconds, kLongestMs) * kMs;
}

// Where results become exceptions.
void check(Result<void> result) {
  if (!result) throw Error(result.error().reason);
}
template <typename T>
T value_of(Result<T> result) {
  if (!result) throw Error(result.error().reason);
  return std::move(*result);
}

// The path keeps its memory until the last view of it is gone.
View owned(View view, const std::shared_ptr<inner::Path>& path) {
  if (!view.owner) view.owner = path;
  return view;
}

Result<std::uint32_t> draw_incarnation() {
  std::uint32_t value = 0;
  while (value == 0)
    if (::getrandom(&value, sizeof(value), 0) != sizeof(value)) return fail(core::errno_error("getrandom", errno));
  return value;
}

// A caller's store behind the interface of the group.
class CallerStore final : public core::Store {
 public:
  explicit CallerStore(std::shared_ptr<nixl::ep::Store> store) : store_(std::move(store)) {}

  Result<void> publish(std::string_view key, std::string_view value) override {
    return guarded([&]() -> Result<void> {
      store_->set(std::string(key), std::string(value));
      return {};
    });
  }
  Result<std::string> fetch(std::string_view key, core::Deadline deadline) override {
    const std::string name(key);
    return guarded([&]() -> Result<std::string> {
      if (!store_->wait(name, deadline.left() / kMs))
        return fail(Code::kTimeout, "key %s is not in the store", name.c_str());
      return store_->get(name);
    });
  }
  Result<void> withdraw(std::string_view key) override {
    return guarded([&]() -> Result<void> {
      store_->remove(std::string(key));
      return {};
    });
  }

 private:
  template <typename Call>
  auto guarded(Call call) -> decltype(call()) {
    try {
      return call();
    } catch (const std::exception& error) {
      return fail(Code::kIo, "the store failed: %s", error.what());
    }
  }
  const std::shared_ptr<nixl::ep::Store> store_;
};

}  // namespace

struct Buffer::Impl {
  explicit Impl(const Options& given) : options(given) {}
  ~Impl() { leave_alone(); }
  const Options options;
  const core::Birthplace birthplace;
  std::uint32_t incarnation = 0;

  // The parts stay alive while a call is inside them, also when another thread destroys the buffer.
  struct Parts {
    std::shared_ptr<inner::Path> path;
    std::shared_ptr<inner::Group> group;  // null before update_memory
    inner::Limits limits;
  };

  mutable std::mutex mutex;  // guards what follows
  Parts parts;
  std::shared_ptr<core::Store> store;
  std::set<int> active;  // by the host, without this rank

  Result<void> open();
  Result<Parts> opened() const;
  Result<Parts> ready() const;
  int bound_locked() const { return std::max(options.rank, active.empty() ? 0 : *active.rbegin()) + 1; }

  Result<void> update_memory(const inner::Capacity& wanted);
  Result<std::vector<int>> connect(const std::vector<int>& ranks, bool activate);
  Result<void> disconnect(const std::vector<int>& ranks);
  Result<void> destroy();
  void leave_alone();
  Result<void> mask(const std::vector<int>& ranks, bool masked, void* stream);
  Result<void> set_masks(const Parts& now, const std::vector<int>& ranks, bool masked, void* stream);
  Result<void> clean_masks(void* stream);
  void forget_departed(inner::Group& group);
  Result<void> find_store(inner::Group& group, const std::vector<int>& ranks);

  template <typename Args>
  Result<void> operate(Result<void> (inner::Path::*verb)(const Args&), const Args& args) {
    NIXL_ASSIGN(const Parts now, ready());
    NIXL_TRY(check_arguments(args, now.limits));
    return (now.path.get()->*verb)(args);
  }
  template <typename Args>
  Result<void> receive(Result<void> (inner::Path::*verb)(const Args&), const Args& args) {
    NIXL_ASSIGN(const Parts now, ready());
    NIXL_TRY(inner::check_memory(args));
    return (now.path.get()->*verb)(args);
  }
};

Result<void> Buffer::Impl::open() {
  if (options.rank < 0 || options.rank >= inner::kMaxRanks)
    return fail(Code::kInvalidArgument, "rank is %d; 0 to %d are allowed", options.rank, inner::kMaxRanks - 1);
  if (const int device = static_cast<int>(options.device); device != 0 && device != 1)
    return fail(Code::kInvalidArgument, "device is %d; 0 (the CPU) and 1 (CUDA) are known", device);
  if (const int combine = static_cast<int>(options.combine); combine != 0 && combine != 1)
    return fail(Code::kInvalidArgument, "combine is %d; 0 (exact) and 1 (reduced) are known", combine);
  if (options.timeout_ms < 0 || options.connect_timeout_ms < 0)
    return fail(Code::kInvalidArgument, "timeout_ms is %lld and connect_timeout_ms %lld; 0 or more are allowed",
                static_cast<long long>(options.timeout_ms), static_cast<long long>(options.connect_timeout_ms));
  NIXL_ASSIGN(incarnation, draw_incarnation());
  const inner::PathOptions path_options{options.rank, options.combine, limit_of(options.timeout_ms), incarnation,
                                        options.nvlink};
  NIXL_ASSIGN(parts.path, options.device == Device::kCuda ? inner::open_cuda_path(path_options)
                                                          : inner::open_cpu_path(path_options));
  return {};
}

Result<Buffer::Impl::Parts> Buffer::Impl::opened() const {
  if (birthplace.is_elsewhere())
    return fail(Code::kNotAllowed, "the buffer of rank %d belongs to the parent process; a forked child makes its own",
                options.rank);
  const std::lock_guard lock(mutex);
  if (!parts.path) return fail(Code::kNotAllowed, "the buffer of rank %d was destroyed", options.rank);
  Parts now = parts;
  now.limits.active_rank_bound = bound_locked();
  return now;
}

Result<Buffer::Impl::Parts> Buffer::Impl::ready() const {
  NIXL_ASSIGN(Parts now, opened());
  if (!now.group) return fail(Code::kNotAllowed, "rank %d has no memory yet: call update_memory first", options.rank);
  return now;
}

Result<void> Buffer::Impl::update_memory(const inner::Capacity& wanted) {
  NIXL_ASSIGN(Parts now, opened());
  NIXL_TRY(check_capacity(wanted, now.limits.capacity, options.rank));
  NIXL_TRY(now.path->reserve(wanted));
  if (!now.group) {
    const inner::GroupOptions group_options{options.rank, incarnation, wanted.experts_per_rank,
                                            limit_of(options.connect_timeout_ms)};
    NIXL_ASSIGN(now.group, inner::Group::open(group_options, *now.path));
  }
  const std::lock_guard lock(mutex);
  now.group->set_store(store);
  parts.group = now.group;
  parts.limits.capacity = wanted;
  return {};
}

Result<std::vector<int>> Buffer::Impl::connect(const std::vector<int>& ranks, bool activate) {
  NIXL_ASSIGN(const Parts now, ready());
  if (ranks.empty()) return fail(Code::kInvalidArgument, "connect: the list of ranks is empty; name at least one");
  for (int rank : ranks)
    if (rank < 0 || rank >= now.limits.capacity.num_ranks)
      return fail(Code::kInvalidArgument, "connect: rank %d is outside the capacity; 0 to %d are allowed", rank,
                  now.limits.capacity.num_ranks - 1);
  NIXL_TRY(find_store(*now.group, ranks));
  auto connected = now.group->connect(ranks);
  forget_departed(*now.group);
  if (!connected)
    return fail(within("connect_ranks of rank " + std::to_string(options.rank), std::move(connected).error()));
  if (!activate) return connected;
  if (auto unmasked = set_masks(now, ranks, false, nullptr); !unmasked) {
    if (!connected->empty()) (void)now.group->disconnect(*connected);
    forget_departed(*now.group);
    return fail(std::move(unmasked).error());
  }
  return connected;
}

// Without a store of the caller: the one that is configured, opened when somebody must be met.
Result<void> Buffer::Impl::find_store(inner::Group& group, const std::vector<int>& ranks) {
  const inner::OpenDefaultStore open = inner::default_store;
  const bool nobody_new = std::ranges::all_of(ranks, [&](int rank) { return rank == options.rank || group.has(rank); });
  {
    const std::lock_guard lock(mutex);
    if (store || !open || nobody_new) return {};
  }
  NIXL_ASSIGN(std::shared_ptr<core::Store> opened_now, open());
  const std::lock_guard lock(mutex);
  if (!store) store = std::move(opened_now);
  group.set_store(store);
  return {};
}

// Ranks that are no members any more are not active either.
void Buffer::Impl::forget_departed(inner::Group& group) {
  const std::lock_guard lock(mutex);
  std::erase_if(active, [&](int rank) { return !group.has(rank); });
}

Result<void> Buffer::Impl::disconnect(const std::vector<int>& ranks) {
  NIXL_ASSIGN(const Parts now, ready());
  if (ranks.empty()) return fail(Code::kInvalidArgument, "disconnect: the list of ranks is empty; name at least one");
  for (int rank : ranks)
    if (!now.group->has(rank))
      return fail(Code::kInvalidArgument, "disconnect: rank %d is %s; nothing was disconnected", rank,
                  rank == options.rank ? "this rank itself" : "not connected");
  NIXL_TRY(set_masks(now, ranks, true, nullptr));
  auto done = now.group->disconnect(ranks);
  forget_departed(*now.group);
  return done;
}

Result<void> Buffer::Impl::mask(const std::vector<int>& ranks, bool masked, void* stream) {
  NIXL_ASSIGN(const Parts now, ready());
  const int capacity = now.limits.capacity.num_ranks;
  for (int rank : ranks) {
    if (rank < 0 || rank >= capacity)
      return fail(Code::kInvalidArgument, "mask: rank %d is outside the capacity; 0 to %d are allowed", rank,
                  capacity - 1);
    if (rank == options.rank && masked)
      return fail(Code::kInvalidArgument, "mask: rank %d is this rank itself, which is always active", rank);
    if (!masked && rank != options.rank && !now.group->has(rank))
      return fail(Code::kInvalidArgument, "unmask: rank %d is not connected; connect it first", rank);
  }
  return set_masks(now, ranks, masked, stream);
}

// Ranks that are not connected are masked already and stay so.
Result<void> Buffer::Impl::set_masks(const Parts& now, const std::vector<int>& ranks, bool masked, void* stream) {
  std::vector<int> members;
  for (int rank : ranks)
    if (now.group->has(rank)) members.push_back(rank);
  if (members.empty()) return {};
  NIXL_TRY(now.path->set_mask(members, masked, stream));
  const std::lock_guard lock(mutex);
  for (int rank : members) {
    if (masked)
      active.erase(rank);
    else
      active.insert(rank);
  }
  return {};
}

Result<void> Buffer::Impl::clean_masks(void* stream) {
  NIXL_ASSIGN(const Parts now, ready());
  return set_masks(now, now.group->members(), false, stream);
}

// The group first: it cancels a running connect, which unmaps what it had mapped.
Result<void> Buffer::Impl::destroy() {
  if (birthplace.is_elsewhere()) return {};
  Parts last;
  std::shared_ptr<core::Store> last_store;
  {
    const std::lock_guard lock(mutex);
    std::swap(last, parts);
    active.clear();
    store.swap(last_store);
  }
  // From inside connect, as a signal handler may: that call has its own share in the parts, and they end with it.
  if (last.group && last.group->cancel_connect_here()) return {};
  if (last.group) last.group->close();
  if (!last.path) return {};
  return last.path->close();
}

// In the child of a fork: the memory is the parent's, which goes on using it, and so are the threads.
void Buffer::Impl::leave_alone() {
  if (!birthplace.is_elsewhere()) return;
  new Parts(std::move(parts));
  new std::shared_ptr<core::Store>(std::move(store));
}

Buffer::Buffer(const Options& options) : impl_(new Impl(options)) {
  check(impl_->open());
}

Buffer::~Buffer() {
  (void)impl_->destroy();
}

void Buffer::update_memory(int num_ranks, int experts_per_rank, std::int64_t num_bytes) {
  check(impl_->update_memory({num_ranks, experts_per_rank, num_bytes}));
}

void Buffer::set_store(std::shared_ptr<Store> store) {
  check(impl_->opened().map([](const auto&) {}));
  // The one before goes behind the lock: a caller's destructor may wait for whoever waits for the lock, as Python's does.
  std::shared_ptr<core::Store> inside = store ? std::make_shared<CallerStore>(std::move(store)) : nullptr;
  const std::lock_guard lock(impl_->mutex);
  impl_->store.swap(inside);
  if (impl_->parts.group) impl_->parts.group->set_store(impl_->store);
}

std::vector<int> Buffer::connect(const std::vector<int>& ranks, bool activate) {
  return value_of(impl_->connect(ranks, activate));
}
void Buffer::disconnect(const std::vector<int>& ranks) {
  check(impl_->disconnect(ranks));
}
void Buffer::destroy() {
  check(impl_->destroy());
}

void Buffer::dispatch(const Dispatch& args) {
  check(impl_->operate(&inner::Path::dispatch, args));
}
void Buffer::dispatch_send(const Dispatch& args) {
  check(impl_->operate(&inner::Path::dispatch_send, args));
}
void Buffer::dispatch_recv(const Dispatch& args) {
  check(impl_->receive(&inner::Path::dispatch_recv, args));
}
void Buffer::combine(const CombineArgs& args) {
  check(impl_->operate(&inner::Path::combine, args));
}
void Buffer::combine_send(const CombineArgs& args) {
  check(impl_->operate(&inner::Path::combine_send, args));
}
void Buffer::combine_recv(const CombineArgs& args) {
  check(impl_->receive(&inner::Path::combine_recv, args));
}
void Buffer::barrier(void* stream) {
  check(value_of(impl_->ready()).path->barrier(stream));
}

View Buffer::next_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks) {
  const auto now = value_of(impl_->ready());
  check(inner::check_combine_buffer(max_tokens, hidden, num_ranks, now.limits));
  return owned(value_of(now.path->next_combine_buffer(max_tokens, hidden, num_ranks)), now.path);
}
View Buffer::data_memory() const {
  const auto now = value_of(impl_->ready());
  return owned(now.path->data_memory(), now.path);
}

void Buffer::mask(const std::vector<int>& ranks, bool masked, void* stream) {
  check(impl_->mask(ranks, masked, stream));
}
void Buffer::clean_masks(void* stream) {
  check(impl_->clean_masks(stream));
}
void Buffer::query_masks(std::int32_t* out, void* stream) const {
  if (!out) throw Error("query_masks: out is null; memory for one int32 a rank is needed");
  check(value_of(impl_->ready()).path->query_masks(out, stream));
}

std::vector<int> Buffer::active_ranks() const {
  value_of(impl_->ready());
  const std::lock_guard lock(impl_->mutex);
  std::set<int> all = impl_->active;
  all.insert(impl_->options.rank);
  return {all.begin(), all.end()};
}
std::vector<int> Buffer::connected_ranks() const {
  return value_of(impl_->ready()).group->members();
}
int Buffer::active_rank_bound() const {
  return value_of(impl_->ready()).limits.active_rank_bound;
}

std::vector<Fault> Buffer::take_faults() {
  return value_of(impl_->ready()).path->take_faults();
}
std::string Buffer::take_input_error() {
  return value_of(impl_->ready()).path->take_input_error();
}
View Buffer::fault_view() const {
  const auto now = value_of(impl_->ready());
  return owned(now.path->fault_view(), now.path);
}
std::uint64_t Buffer::incarnation() const {
  return impl_->incarnation;
}

std::int64_t size_hint(std::int64_t max_tokens, std::int64_t hidden, int num_ranks, int num_experts) {
  constexpr std::int64_t kMostElements = inner::kMaxTokens * inner::kMaxHidden;
  if (max_tokens <= 0 || max_tokens > inner::kMaxTokens || hidden <= 0 || hidden > kMostElements / max_tokens ||
      num_ranks <= 0 || num_experts <= 0 || num_experts > inner::kMostExperts)
    throw Error("size hint of " + std::to_string(max_tokens) + " tokens, hidden size " + std::to_string(hidden) + ", " +
                std::to_string(num_ranks) + " ranks, " + std::to_string(num_experts) +
                " experts: all must be positive, tokens at most " + std::to_string(inner::kMaxTokens) +
                ", tokens times hidden size " + std::to_string(kMostElements) + ", experts " +
                std::to_string(inner::kMostExperts));
  return inner::size_hint_bytes(max_tokens, hidden, num_experts);
}

std::int64_t record_bytes(Device device, std::int64_t max_tokens, int topk, int num_ranks) {
  if (topk < 1 || topk > inner::kMaxTopk)
    throw Error("top-k is " + std::to_string(topk) + "; 1 to " + std::to_string(inner::kMaxTopk) + " are allowed");
  if (max_tokens <= 0 || num_ranks <= 0)
    throw Error("record_bytes of " + std::to_string(max_tokens) + " tokens, " + std::to_string(num_ranks) +
                " ranks: both must be positive");
  return device == Device::kCuda ? inner::make_record_layout(max_tokens, topk, num_ranks).total : 0;
}

std::string cuda_unavailable_reason() {
  return inner::cuda_unavailable_reason();
}

}  // namespace nixl::ep
