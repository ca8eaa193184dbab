#include "backends/ucx/worker.h"

#include <algorithm>

#include "backends/ucx/link.h"
#include "base/log.h"

namespace nixl::core::ucx {
namespace {

constexpr unsigned kQuietAfter = 200;  // rounds of progress without any
constexpr unsigned kQuietLooks = 8;    // of which one is taken then
constexpr Nanoseconds kLongestGap = 1'000'000'000;

}  // namespace

Result<std::unique_ptr<Worker>> Worker::open(const Context& context, Receiver& receiver, unsigned index) {
  std::unique_ptr<Worker> worker(new Worker());
  worker->context_ = &context;
  worker->receiver_ = &receiver;
  NIXL_TRY(worker->start(index));
  return worker;
}

Result<void> Worker::start(unsigned index) {
  index_ = index;
  ucp_worker_params_t params{};
  params.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
  params.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  if (const ucs_status_t status = api().worker_create(context_->handle(), &params, &handle_); status != UCS_OK) {
    handle_ = nullptr;
    return fail(ucx_error(api(), "create UCX worker", status));
  }
  if (const ucs_status_t status = api().worker_get_efd(handle_, &event_fd_); status != UCS_OK)
    return fail(ucx_error(api(), "event descriptor of the UCX worker", status));
  ucp_worker_attr_t attributes{};
  attributes.field_mask = UCP_WORKER_ATTR_FIELD_ADDRESS;
  if (const ucs_status_t status = api().worker_query(handle_, &attributes); status != UCS_OK)
    return fail(ucx_error(api(), "address of the UCX worker", status));
  address_.assign(reinterpret_cast<const char*>(attributes.address), attributes.address_length);
  api().worker_release_address(handle_, attributes.address);

  for (unsigned id = kHello; id < kNumMessageIds; ++id) {
    bindings_[id] = {this, static_cast<MessageId>(id)};
    ucp_am_handler_param_t handler{};
    handler.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                         UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
    handler.id = id;
    handler.flags = UCP_AM_FLAG_WHOLE_MSG;
    handler.cb = &Worker::on_message;
    handler.arg = &bindings_[id];
    if (const ucs_status_t status = api().worker_set_am_recv_handler(handle_, &handler); status != UCS_OK)
      return fail(ucx_error(api(), "message handler of the UCX worker", status));
  }
  return {};
}

Worker::~Worker() {
  if (handle_) api().worker_destroy(handle_);
}

std::unique_lock<std::mutex> Worker::lock() {
  waiting_.fetch_add(1, std::memory_order_relaxed);
  std::unique_lock lock(*mutex_);
  waiting_.fetch_sub(1, std::memory_order_relaxed);
  return lock;
}

bool Worker::progress() {
  // A mutex is not fair: without this a polling thread would keep it from those who have work to submit.
  if (waiting_.load(std::memory_order_relaxed) > 0) return true;
  // Over TCP every look costs a system call. With nothing under way and nothing seen for a while, most looks are left
  // out.
  if (quiet_.load(std::memory_order_relaxed) && num_looks_.fetch_add(1, std::memory_order_relaxed) % kQuietLooks != 0)
    return false;
  std::unique_lock lock(*mutex_, std::try_to_lock);
  return lock.owns_lock() && progress_locked();
}

// Time in which nobody drives this worker is no fault of the peers that are waited for: of a gap one second counts.
void Worker::excuse_gap_locked() {
  if (connecting_.empty()) return;
  const Nanoseconds now = now_ns();
  if (const Nanoseconds gap = now - looked_at_; gap > kLongestGap)
    for (Link* const link : connecting_) link->excuse_locked(gap - kLongestGap);
  looked_at_ = now;
}

bool Worker::progress_locked() {
  bool any = false;
  owes_look_ = false;
  excuse_gap_locked();
  for (int round = 0; round < 8 && api().worker_progress(handle_) != 0; ++round) any = true;
  settle_locked();
  any |= !queue_.empty();
  idle_rounds_ = any || num_jobs_ > 0 || !connecting_.empty() ? 0 : idle_rounds_ + 1;
  quiet_.store(idle_rounds_ > kQuietAfter, std::memory_order_relaxed);
  return any;
}

// Acts on what UCX's callbacks left behind: UCX must not be re-entered from them.
void Worker::settle_locked() {
  // A peer that says good-bye closes right afterwards: its word comes before the broken link.
  for (auto& [id, bytes] : arrived_)
    if (id == kBye) receiver_->received_locked(*this, id, bytes);
  while (!failed_.empty()) {
    Link* const link = failed_.back();
    failed_.pop_back();
    link->failed_locked();
  }
  if (!arrived_.empty()) {
    std::vector<std::pair<MessageId, std::string>> batch;
    batch.swap(arrived_);
    for (const auto& [id, bytes] : batch)
      if (id != kBye) receiver_->received_locked(*this, id, bytes);
  }
  if (!connecting_.empty()) {
    const std::vector<Link*> waiting = connecting_;
    for (Link* const link : waiting) link->check_deadline_locked();
  }
  walking_.swap(queue_);
  for (std::size_t i = 0; i < walking_.size(); ++i) {
    Job* const job = walking_[i];
    if (!job) continue;
    job->queued_ = false;
    if (job->advance_locked() && walking_[i] == job) queue_locked(*job);
  }
  walking_.clear();
  receiver_->settled_locked(*this);
}

bool Worker::arm(Deadline& next) {
  const auto guard = lock();
  if (!queue_.empty() || !failed_.empty() || !arrived_.empty()) return false;
  if (owes_look_) return false;  // somebody else held the lock
  if (api().worker_arm(handle_) != UCS_OK) {
    // Events are pending. UCX says so once: the answer has taken the signal of what waits for progress.
    owes_look_ = true;
    quiet_.store(false, std::memory_order_relaxed);
    return false;
  }
  for (const Link* link : connecting_) next = next.earlier(link->deadline());
  return true;
}

void Worker::queue_locked(Job& job) {
  if (job.queued_) return;
  job.queued_ = true;
  queue_.push_back(&job);
}

void Worker::forget_locked(Job& job) {
  std::erase(queue_, &job);
  std::replace(walking_.begin(), walking_.end(), &job, static_cast<Job*>(nullptr));
  job.queued_ = false;
}

void Worker::on_completed(void* request, ucs_status_t status, void* data) {
  auto* const job = static_cast<Job*>(data);
  (*open_api())->request_free(request);
  job->completed_locked(status);
}

ucp_request_param_t Worker::parameters(Job& job, ucp_mem_h memory) const {
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  param.cb.send = &Worker::on_completed;
  param.user_data = &job;
  if (memory) {
    param.op_attr_mask |= UCP_OP_ATTR_FIELD_MEMH;
    param.memh = memory;
  }
  return param;
}

Result<bool> Worker::started(ucs_status_ptr_t request, const char* what) {
  if (request == nullptr) return false;
  if (UCS_PTR_IS_ERR(request)) return fail(operation_error(api(), what, UCS_PTR_STATUS(request)));
  return true;
}

Result<bool> Worker::put_locked(Job& job, ucp_ep_h ep, const Piece& piece) {
  const ucp_request_param_t param = parameters(job, piece.memory);
  return started(api().put_nbx(ep, piece.local, piece.length, piece.remote, piece.key, &param), "UCX put");
}

Result<bool> Worker::get_locked(Job& job, ucp_ep_h ep, const Piece& piece) {
  const ucp_request_param_t param = parameters(job, piece.memory);
  return started(api().get_nbx(ep, piece.local, piece.length, piece.remote, piece.key, &param), "UCX get");
}

Result<bool> Worker::flush_locked(Job& job, ucp_ep_h ep) {
  const ucp_request_param_t param = parameters(job, nullptr);
  return started(api().ep_flush_nbx(ep, &param), "UCX flush");
}

void Worker::on_sent(void* request, ucs_status_t, void* bytes) {
  (*open_api())->request_free(request);
  delete static_cast<std::string*>(bytes);
}

Result<void> Worker::send_locked(ucp_ep_h ep, MessageId id, std::string bytes) {
  auto kept = std::make_unique<std::string>(std::move(bytes));
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS;
  param.cb.send = &Worker::on_sent;
  param.user_data = kept.get();
  param.flags = UCP_AM_SEND_FLAG_EAGER;
  const ucs_status_ptr_t request = api().am_send_nbx(ep, id, nullptr, 0, kept->data(), kept->size(), &param);
  if (UCS_PTR_IS_ERR(request)) return fail(operation_error(api(), "UCX message", UCS_PTR_STATUS(request)));
  if (request != nullptr) (void)kept.release();  // on_sent frees it
  return {};
}

ucs_status_t Worker::on_message(void* data, const void*, std::size_t, void* bytes, std::size_t length,
                                const ucp_am_recv_param_t* param) {
  const Binding& binding = *static_cast<Binding*>(data);
  if ((param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) {
    NIXL_WARN("UCX message %u announced for rendezvous is dropped: our peers send all of theirs eagerly", binding.id);
    return UCS_OK;
  }
  binding.worker->arrived_.emplace_back(binding.id, std::string(static_cast<const char*>(bytes), length));
  return UCS_OK;
}

}  // namespace nixl::core::ucx
