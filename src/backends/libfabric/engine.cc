#include "backends/libfabric/engine.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/log.h"

namespace nixl::core::libfabric {
namespace {

constexpr std::size_t kFramesIn = 64, kFramesOut = 64;  // a rail
constexpr int kFramesOfOne = 8;                         // that one peer may hold
constexpr int kRoundsAtOnce = 8;
// Until what had no room is tried again, when nothing happens before: the longer nothing happens, the longer.
constexpr Nanoseconds kLeastPause = 1'000'000, kMostPause = 50'000'000;
constexpr Nanoseconds kBlindPause = 1'000'000;  // between looks where nothing can be waited for

}  // namespace

// ---- outbox ----

Outbox::Outbox(Engine& engine, Rail& rail, fi_addr_t peer, std::function<void(const Error&)> on_error)
    : engine_(&engine), rail_(&rail), peer_(peer), on_error_(std::move(on_error)) {}

Outbox::~Outbox() {
  clear_locked();
}

void Outbox::post_locked(std::string bytes) {
  queue_.push_back(std::move(bytes));
  if (queue_.size() == 1) {
    engine_->pending_.push_back(this);
    engine_->pump_locked(*this);
  }
}

void Outbox::clear_locked() {
  queue_.clear();
  in_flight_ = 0;
  waits_since_ = 0;
  error_ = 0;
  std::erase(engine_->pending_, this);
  std::erase(engine_->failed_, this);
  for (const auto& buffers : engine_->buffers_)
    for (const auto& frame : buffers.frames)
      if (frame->owner == this) frame->owner = nullptr;
}

// ---- engine ----

Result<std::unique_ptr<Engine>> Engine::open(const Api& api, const Options& options, Provider provider,
                                             Receiver& receiver) {
  std::unique_ptr<Engine> engine(new Engine(api, options, receiver));
  engine->provider_ = provider.name;
  for (Info& info : provider.rails) {
    auto rail =
        Rail::open(api, std::move(info), static_cast<unsigned>(engine->rails_.size()), provider.delivery_complete);
    if (!rail && provider.rails.size() > 1) {
      NIXL_WARN("LIBFABRIC: a device is left out: %s", rail.error().reason.c_str());
      continue;
    }
    if (!rail) return fail(std::move(rail.error()));
    engine->rails_.push_back(std::move(*rail));
  }
  if (engine->rails_.empty()) return fail(Code::kIo, "no device of provider %s could be opened", provider.name.c_str());
  for (const auto& rail : engine->rails_) NIXL_TRY(engine->add_buffers(*rail));
  return engine;
}

Result<void> Engine::add_buffers(Rail& rail) {
  Buffers buffers;
  constexpr std::size_t kNumFrames = kFramesIn + kFramesOut;
  buffers.bytes = std::make_unique<char[]>(kNumFrames * kFrameBytes);
  if (rail.maps_local_memory()) {
    NIXL_ASSIGN(buffers.mapping, rail.map_locked({MemKind::kDram, reinterpret_cast<std::uint64_t>(buffers.bytes.get()),
                                                  kNumFrames * kFrameBytes, 0, ""}));
  }
  free_frames_.emplace_back();
  for (std::size_t i = 0; i < kNumFrames; ++i) {
    auto frame = std::make_unique<Frame>();
    frame->bytes = buffers.bytes.get() + i * kFrameBytes;
    frame->descriptor = buffers.mapping ? buffers.mapping->descriptor() : nullptr;
    frame->rail = &rail;
    frame->incoming = i < kFramesIn;
    frame->operation.frame = frame.get();
    frame->operation.rail = rail.index();
    (frame->incoming ? to_post_ : free_frames_.back()).push_back(frame.get());
    buffers.frames.push_back(std::move(frame));
  }
  buffers_.push_back(std::move(buffers));
  return {};
}

Engine::~Engine() {
  // Endpoints go before the memory that they use, and that before its domain.
  for (const auto& rail : rails_) rail->stop();
  for (Buffers& buffers : buffers_) buffers.mapping.reset();
  rails_.clear();
}

std::unique_lock<std::mutex> Engine::lock() {
  waiting_.fetch_add(1, std::memory_order_relaxed);
  std::unique_lock lock(*mutex_);
  waiting_.fetch_sub(1, std::memory_order_relaxed);
  return lock;
}

bool Engine::progress() {
  // A mutex is not fair: without this a polling thread would keep it from those who have work to submit.
  if (waiting_.load(std::memory_order_relaxed) > 0) return true;
  std::unique_lock lock(*mutex_, std::try_to_lock);
  return lock.owns_lock() && progress_locked();
}

bool Engine::progress_locked() {
  bool any = false;
  for (const auto& rail : rails_) any |= collect_locked(*rail);
  if (any) happened_at_ = now_ns();
  deliver_locked();
  report_failures_locked();
  pump_all_locked();
  any |= std::any_of(queue_.begin(), queue_.end(), [](const Job* job) { return !job->blocked_; });
  advance_jobs_locked();
  if (const Nanoseconds now = now_ns(); now >= next_tick_) {
    const Nanoseconds late = next_tick_ == 0 ? 0 : now - next_tick_;
    next_tick_ = INT64_MAX;
    tick_at_locked(receiver_->tick_locked(now, late));
  }
  return any;
}

bool Engine::collect_locked(Rail& rail) {
  std::array<Completion, 64> batch;
  bool any = false;
  for (int round = 0; round < kRoundsAtOnce; ++round) {
    const int got = rail.poll_locked(batch.data(), static_cast<int>(batch.size()));
    if (got == 0) break;
    any = true;
    for (int i = 0; i < got; ++i) ended_locked(batch[static_cast<std::size_t>(i)]);
  }
  return any;
}

void Engine::ended_locked(const Completion& completion) {
  Operation* const operation = completion.operation;
  if (!operation) return;  // an error that belongs to no operation: whoever is concerned meets it
  if (Frame* const frame = operation->frame) {
    if (frame->incoming) {
      arrived_.push_back(frame);
      arrived_bytes_.push_back(completion.error == 0 ? completion.length : 0);
      return;
    }
    if (Outbox* const owner = frame->owner) {
      --owner->in_flight_;
      if (completion.error != 0) {
        owner->error_ = completion.error;
        failed_.push_back(owner);
      }
      frame->owner = nullptr;
    }
    free_frames_[frame->rail->index()].push_back(frame);
    return;
  }
  Job* const job = operation->job;
  const Operation ended = *operation;
  give_back_locked(*operation);
  if (job) job->completed_locked(ended, completion.error);
}

// Hands out what has arrived, and makes room for more.
void Engine::deliver_locked() {
  for (std::size_t i = 0; i < arrived_.size(); ++i) {
    Frame& frame = *arrived_[i];
    if (arrived_bytes_[i] > 0)
      receiver_->received_locked(*frame.rail, std::string_view(frame.bytes, std::min(arrived_bytes_[i], kFrameBytes)));
    to_post_.push_back(&frame);
  }
  arrived_.clear();
  arrived_bytes_.clear();
  while (!to_post_.empty()) {
    Frame& frame = *to_post_.back();
    if (frame.rail->receive_locked(frame.bytes, kFrameBytes, frame.descriptor, frame.operation) != 0) break;
    to_post_.pop_back();
  }
}

void Engine::report_failures_locked() {
  while (!failed_.empty()) {
    Outbox& outbox = *failed_.back();
    std::erase(failed_, &outbox);
    outbox.queue_.clear();
    std::erase(pending_, &outbox);
    const Error why = fabric_error(*api_, "message over " + outbox.rail_->label(), outbox.error_, Code::kPeerLost);
    const auto tell = outbox.on_error_;  // which may destroy the outbox
    tell(why);
  }
}

void Engine::pump_locked(Outbox& outbox) {
  send_some_locked(outbox);
  if (outbox.queue_.empty()) {
    std::erase(pending_, &outbox);
  } else if (outbox.waits_since_ == 0) {
    outbox.waits_since_ = now_ns();
    tick_at_locked(outbox.waits_since_);  // whoever looks after it may act on that
  }
}

void Engine::send_some_locked(Outbox& outbox) {
  auto& frames = free_frames_[outbox.rail_->index()];
  while (!outbox.queue_.empty() && !frames.empty() && outbox.in_flight_ < kFramesOfOne) {
    Frame& frame = *frames.back();
    const std::string& bytes = outbox.queue_.front();
    std::copy(bytes.begin(), bytes.end(), frame.bytes);
    const long status =
        outbox.rail_->send_locked(frame.bytes, bytes.size(), frame.descriptor, outbox.peer_, frame.operation);
    if (status == -FI_EAGAIN) return;
    if (status != 0) {
      outbox.error_ = status;
      failed_.push_back(&outbox);
      return;
    }
    outbox.waits_since_ = 0;
    frames.pop_back();
    frame.owner = &outbox;
    ++outbox.in_flight_;
    outbox.queue_.pop_front();
  }
}

void Engine::pump_all_locked() {
  if (pending_.empty()) return;
  const std::vector<Outbox*> pending = pending_;  // sending calls nobody back
  for (Outbox* const outbox : pending) pump_locked(*outbox);
}

void Engine::advance_jobs_locked() {
  walking_.swap(queue_);
  for (std::size_t i = 0; i < walking_.size(); ++i) {
    Job* const job = walking_[i];
    if (!job) continue;
    job->queued_ = false;
    const Job::Next next = job->advance_locked();
    if (next == Job::Next::kNothing || walking_[i] != job) continue;
    queue_locked(*job);
    job->blocked_ = next == Job::Next::kBlocked;
  }
  walking_.clear();
}

bool Engine::arm(Deadline& next) {
  const auto guard = lock();
  if (!failed_.empty() || !arrived_.empty()) return false;
  bool blocked = !pending_.empty() || !to_post_.empty();
  for (const Job* const job : queue_) {
    if (!job->blocked_) return false;
    blocked = true;
  }
  bool blind = false;
  for (const auto& rail : rails_) {
    if (!rail->may_sleep_locked()) return false;
    blind |= rail->wait_fd() < 0;
  }
  if (blocked) next = next.earlier(Deadline::after(std::clamp((now_ns() - happened_at_) / 8, kLeastPause, kMostPause)));
  if (blind) next = next.earlier(Deadline::after(kBlindPause));
  if (next_tick_ != INT64_MAX) next = next.earlier(Deadline::after(std::max<Nanoseconds>(next_tick_ - now_ns(), 0)));
  return true;
}

std::vector<int> Engine::wait_fds() const {
  std::vector<int> list;
  for (const auto& rail : rails_)
    if (rail->wait_fd() >= 0) list.push_back(rail->wait_fd());
  return list;
}

void Engine::queue_locked(Job& job) {
  job.blocked_ = false;
  if (job.queued_) return;
  job.queued_ = true;
  queue_.push_back(&job);
}

void Engine::forget_locked(Job& job) {
  std::erase(queue_, &job);
  std::replace(walking_.begin(), walking_.end(), &job, static_cast<Job*>(nullptr));
  job.queued_ = false;
}

void Engine::orphan_locked(Job& job) {
  forget_locked(job);
  for (Operation& operation : operations_)
    if (operation.job == &job) {
      operation.job = nullptr;
      operation.counted = false;  // it may never complete
      --num_in_flight_;
    }
}

Operation* Engine::take_operation_locked(Job& job, unsigned rail) {
  if (num_in_flight_ >= options_.post_queue_size) return nullptr;
  if (free_operations_.empty()) {
    operations_.emplace_back();
    free_operations_.push_back(&operations_.back());
  }
  Operation* const operation = free_operations_.back();
  free_operations_.pop_back();
  operation->job = &job;
  operation->rail = rail;
  operation->counted = true;
  ++num_in_flight_;
  return operation;
}

void Engine::give_back_locked(Operation& operation) {
  operation.job = nullptr;
  if (std::exchange(operation.counted, false)) --num_in_flight_;
  free_operations_.push_back(&operation);
}

}  // namespace nixl::core::libfabric
