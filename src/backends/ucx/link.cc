#include "backends/ucx/link.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#include "base/log.h"

namespace nixl::core::ucx {
namespace {

constexpr std::size_t kHistoryBytes = 256 << 10;  // of sent notifications kept for the case that the link breaks
// Before a broken link is opened again. A process that dies has let go of everything by then and is known to be dead: UCX
// keeps the socket of an endpoint whose connection is refused at once.
constexpr Nanoseconds kBeforeAgain = 10'000'000;

std::uint64_t next_link_id() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

// Transports whose get is done by hardware, by the kernel or by this process itself.
bool fetches(std::string_view transport) {
  for (const std::string_view prefix :
       {"rc", "dc", "srd", "gga", "cma", "knem", "xpmem", "posix", "sysv", "self", "cuda_ipc"})
    if (transport.starts_with(prefix)) return true;
  return false;
}

void on_closed(void* request, ucs_status_t, void*) {
  (*open_api())->request_free(request);
}

}  // namespace

Result<std::unique_ptr<Link>> Link::open_locked(Worker& worker, Target target, const Caller& caller) {
  std::unique_ptr<Link> link(new Link());
  link->worker_ = &worker;
  link->caller_ = &caller;
  link->target_ = std::move(target);
  link->id_ = next_link_id();
  NIXL_TRY(link->open_endpoint_locked(caller.connect_ns));
  return link;
}

Result<void> Link::open_endpoint_locked(Nanoseconds patience) {
  const Api& api = worker_->api();
  ucp_ep_params_t params{};
  params.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE;
  params.address = reinterpret_cast<const ucp_address_t*>(target_.address.data());
  const bool watched = target_.peer_errors && !target_.is_self;
  params.err_mode = watched ? UCP_ERR_HANDLING_MODE_PEER : UCP_ERR_HANDLING_MODE_NONE;
  if (watched) {
    params.field_mask |= UCP_EP_PARAM_FIELD_ERR_HANDLER;
    params.err_handler = {&Link::on_error, this};
  }
  failure_ = UCS_OK;
  if (const ucs_status_t status = api.ep_create(worker_->handle_, &params, &ep_); status != UCS_OK) {
    ep_ = nullptr;
    return fail(ucx_error(api, "connect to agent '" + target_.name + "' with " + worker_->context().transports_asked(),
                          status));
  }
  ++generation_;
  ++num_attempts_;
  describe();
  if (target_.is_self || target_.answer_only) {
    state_ = State::kReady;
    return {};
  }
  state_ = State::kConnecting;
  deadline_ = Deadline::after(patience);
  if (worker_->connecting_.empty()) worker_->looked_at_ = now_ns();
  worker_->connecting_.push_back(this);
  worker_->quiet_ = false;
  return worker_->send_locked(
      ep_, kHello, encode(Hello{target_.incarnation, caller_->incarnation, id_, caller_->name, worker_->address()}));
}

void Link::describe() {
  std::array<ucp_transport_entry_t, 32> entries{};
  ucp_ep_attr_t attributes{};
  attributes.field_mask = UCP_EP_ATTR_FIELD_TRANSPORTS;
  attributes.transports.entries = entries.data();
  attributes.transports.num_entries = entries.size();
  attributes.transports.entry_size = sizeof(ucp_transport_entry_t);
  path_.clear();
  reads_by_request_ = only_tcp_ = true;
  if (worker_->api().ep_query(ep_, &attributes) != UCS_OK) attributes.transports.num_entries = 0;
  for (unsigned i = 0; i < attributes.transports.num_entries; ++i) {
    const std::string transport = entries[i].transport_name;
    const std::string label = transport + "/" + entries[i].device_name;
    if (fetches(transport)) reads_by_request_ = false;
    if (transport != "tcp") only_tcp_ = false;
    if (path_.find(label) == std::string::npos) path_ += (path_.empty() ? "" : "+") + label;
  }
  if (path_.empty()) path_ = "ucx (transports unknown to this version)";
}

void Link::on_error(void* data, ucp_ep_h, ucs_status_t status) {
  auto* const link = static_cast<Link*>(data);
  link->failure_ = status;
  auto& failed = link->worker_->failed_;
  if (std::find(failed.begin(), failed.end(), link) == failed.end()) failed.push_back(link);
}

// `clean`: nothing is in flight. UCX 1.22 crashes later when an endpoint over TCP is closed by force while its socket
// is full, so force is for endpoints that are clean or that UCX itself has reported as failed; the others close when
// their last operation ends, or with the worker.
void Link::drop_endpoint_locked(bool clean) {
  if (!ep_) return;
  ucp_request_param_t param{};
  param.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_FLAGS;
  param.cb.send = &on_closed;
  const bool can_force = target_.peer_errors && !target_.is_self;
  param.flags = can_force && (clean || failure_ != UCS_OK) ? unsigned{UCP_EP_CLOSE_FLAG_FORCE} : 0u;
  (void)worker_->api().ep_close_nbx(ep_, &param);  // a request is freed by its callback; errors leave nothing to do
  ep_ = nullptr;
  std::erase(worker_->failed_, this);
  std::erase(worker_->connecting_, this);
  deadline_ = Deadline::never();
}

void Link::close_locked(Nanoseconds linger) {
  const Api& api = worker_->api();
  bool clean = false;
  if (ep_ && state_ == State::kReady) {
    // What was queued must be out before the endpoint goes; a peer that stopped reading is not waited for.
    ucp_request_param_t param{};
    const ucs_status_ptr_t request = api.ep_flush_nbx(ep_, &param);
    clean = request == nullptr;
    if (request != nullptr && !UCS_PTR_IS_ERR(request)) {
      const Deadline deadline = Deadline::after(linger);
      ucs_status_t status = UCS_INPROGRESS;
      while ((status = api.request_check_status(request)) == UCS_INPROGRESS && !deadline.passed())
        api.worker_progress(worker_->handle_);
      clean = status == UCS_OK;
      api.request_free(request);
    }
  }
  state_ = State::kLost;
  drop_endpoint_locked(clean);
  std::erase(worker_->connecting_, this);
  std::erase(worker_->failed_, this);
  for (int round = 0; round < 64 && api.worker_progress(worker_->handle_) != 0; ++round) {
  }
  for (Job* const job : jobs_) job->abandon_locked();
  worker_->num_jobs_ -= static_cast<int>(jobs_.size());
  jobs_.clear();
}

void Link::acknowledged_locked(const HelloAck& ack) {
  if (state_ != State::kConnecting) return;
  if (ack.incarnation != target_.incarnation) {
    lose_locked(Error{Code::kPeerLost, "agent '" + target_.name + "' is gone: another agent answers at its address"});
    return;
  }
  const std::uint64_t oldest = history_.empty() ? next_sequence_ : history_.front().sequence;
  if (ack.next_sequence < oldest) {
    lose_locked(Error{Code::kPeerLost, "the link to agent '" + target_.name + "' broke and " +
                                           std::to_string(oldest - ack.next_sequence) +
                                           " notifications sent before may not have arrived"});
    return;
  }
  std::erase(worker_->connecting_, this);
  deadline_ = Deadline::never();
  state_ = State::kReady;
  num_attempts_ = 0;
  used_ = true;
  next_to_send_ = ack.next_sequence;
  send_history_locked();
  const std::vector<Job*> jobs = jobs_;
  for (Job* const job : jobs) job->link_up_locked();
}

void Link::dismissed_locked() {
  dismissed_ = true;
  lose_locked(Error{Code::kPeerLost, "agent '" + target_.name + "' left"});
}

// UCX reported an error of the endpoint.
void Link::failed_locked() {
  if (state_ == State::kLost) return;
  const Error why =
      ucx_error(worker_->api(), "agent '" + target_.name + "' (" + path_ + ")", failure_, Code::kPeerLost);
  // UCX may report the end of its own helper connection, reset while two busy processes connect, as that of the whole
  // endpoint: an attempt that fails before the peer has answered is repeated once.
  const bool was_ready = state_ == State::kReady;
  const bool try_again = !target_.answer_only && (was_ready || num_attempts_ < 2);
  const Nanoseconds patience = was_ready ? caller_->reconnect_ns : deadline_.left();
  drop_endpoint_locked(false);
  if (!try_again) {
    lose_locked(why_.reason.empty() ? why : why_);
    return;
  }
  NIXL_INFO("%s; connecting again", why.reason.c_str());
  why_ = why;  // reported if the second attempt fails as well
  state_ = State::kConnecting;
  const std::vector<Job*> jobs = jobs_;
  for (Job* const job : jobs) job->link_down_locked();
  again_ = std::max<Nanoseconds>(patience, 1);
  deadline_ = Deadline::after(kBeforeAgain);
  if (worker_->connecting_.empty()) worker_->looked_at_ = now_ns();
  worker_->connecting_.push_back(this);
  worker_->quiet_ = false;
}

void Link::excuse_locked(Nanoseconds time) {
  if (const Nanoseconds left = deadline_.left(); left < INT64_MAX - time) deadline_ = Deadline::after(left + time);
}

void Link::check_deadline_locked() {
  if (state_ != State::kConnecting || !deadline_.passed()) return;
  if (const Nanoseconds patience = std::exchange(again_, 0); patience > 0) {
    std::erase(worker_->connecting_, this);
    if (worker_->receiver_->surely_gone(*this) || !open_endpoint_locked(patience)) lose_locked(why_);
    return;
  }
  lose_locked(why_.reason.empty()
                  ? Error{Code::kPeerLost, "agent '" + target_.name + "' did not answer over " + path_ + " within " +
                                               std::to_string(caller_->connect_ns / 1'000'000) + " ms"}
                  : why_);
}

void Link::lose_locked(Error why) {
  if (state_ == State::kLost) return;
  state_ = State::kLost;
  why_ = std::move(why);
  drop_endpoint_locked(false);
  std::erase(worker_->connecting_, this);
  const std::vector<Job*> jobs = jobs_;
  for (Job* const job : jobs) job->link_lost_locked(why_);
  history_.clear();
  worker_->receiver_->link_lost_locked(*this, why_);
}

void Link::join_locked(Job& job) {
  jobs_.push_back(&job);
  used_ = true;
  ++worker_->num_jobs_;
  worker_->quiet_ = false;
}

void Link::leave_locked(Job& job) {
  worker_->num_jobs_ -= static_cast<int>(std::erase(jobs_, &job));
}

Result<void> Link::notify_locked(std::string_view text) {
  if (state_ == State::kLost) return fail(why_);
  std::string bytes = encode(Notify{caller_->incarnation, id_, next_sequence_, caller_->name, text});
  history_bytes_ += bytes.size();
  used_ = true;
  history_.push_back({next_sequence_++, std::move(bytes)});
  if (state_ == State::kReady) send_history_locked();
  return {};
}

void Link::send_history_locked() {
  while (next_to_send_ < next_sequence_) {
    const Sent& sent = history_[next_to_send_ - history_.front().sequence];
    if (auto ok = worker_->send_locked(ep_, kNotify, sent.bytes); !ok)
      break;  // the endpoint failed: its handler follows
    ++next_to_send_;
  }
  while (history_bytes_ > kHistoryBytes && !history_.empty() && history_.front().sequence < next_to_send_) {
    history_bytes_ -= history_.front().bytes.size();
    history_.pop_front();
  }
}

}  // namespace nixl::core::ucx
