#include "fileio/engine.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "fileio/plain_call.h"
#include "fileio/request.h"

namespace nixl::core::fileio {
namespace {

constexpr std::size_t kReapBatch = 64;
// Jobs given to a queue at once. The kernel holds a batch back until it has all of it, and nobody looks for finished
// ones meanwhile: with long batches the device runs dry between them. Threads pay a lock a batch instead of a system
// call.
constexpr std::size_t kKernelBatch = 4, kThreadBatch = 64;
constexpr std::size_t kTurn = 32;  // jobs of one request before another request gets its turn

// Misaligned memory of the caller, for direct I/O.
class AligningCopier final : public Copier {
 public:
  Result<void> to_host(void* host, std::span<const iovec> memory) override {
    for (const iovec& part : memory) {
      std::memcpy(host, part.iov_base, part.iov_len);
      host = static_cast<std::byte*>(host) + part.iov_len;
    }
    return {};
  }
  Result<void> from_host(std::span<const iovec> memory, const void* host, std::size_t bytes) override {
    for (const iovec& part : memory) {
      const std::size_t count = std::min(bytes, part.iov_len);
      std::memcpy(part.iov_base, host, count);
      host = static_cast<const std::byte*>(host) + count;
      bytes -= count;
    }
    return {};
  }
  std::string last_error() const override { return {}; }
  void* allocate(std::size_t bytes) override { return std::aligned_alloc(4096, bytes); }
  void free(void* buffer, std::size_t) override { std::free(buffer); }
};
AligningCopier aligning_copier;

Error job_error(const Request& request, const Job& job, std::uint64_t done, std::int64_t result) {
  const unsigned long long bytes = job.bytes, offset = job.offset;
  char what[128];
  std::snprintf(what, sizeof what, "%s of %llu bytes at offset %llu of ", request.write ? "write" : "read", bytes,
                offset);
  const std::string context = what + request.files[job.file]->name();
  if (result == kCopyFailed) return {Code::kIo, context + ": copy through host memory: " + job.copier->last_error()};
  if (result == 0) {
    if (request.write)
      return {Code::kIo, context + ": nothing more was taken after " + std::to_string(done) + " bytes"};
    struct stat status;  // a later job may be the first to meet the end, so its own offset would mislead
    const std::uint64_t end =
        ::fstat(job.fd, &status) == 0 ? static_cast<std::uint64_t>(status.st_size) : offset + done;
    return {Code::kIo,
            context + ": the file ends at offset " + std::to_string(end) + " (truncated, or shorter than asked for)"};
  }
  std::string reason = errno_text(static_cast<int>(-result));
  if (done > 0) reason += " after " + std::to_string(done) + " bytes";
  return {result == -ECANCELED ? Code::kCancelled : Code::kIo, context + ": " + reason};
}

// What is left of a job after `done` bytes.
void rest_of(const Request& request, const Job& job, std::uint64_t done, std::vector<iovec>& rest) {
  rest.clear();
  for (std::uint32_t i = 0; i < job.num_iov; ++i) {
    iovec part = request.iovs[job.first_iov + i];
    const std::uint64_t skip = std::min<std::uint64_t>(done, part.iov_len);
    done -= skip;
    if (skip == part.iov_len) continue;
    part.iov_base = static_cast<std::byte*>(part.iov_base) + skip;
    part.iov_len -= skip;
    rest.push_back(part);
  }
}

}  // namespace

Result<std::unique_ptr<Engine>> Engine::open(const EngineConfig& config) {
  using Opener = Result<std::unique_ptr<Queue>> (*)(std::uint32_t);
  struct Choice {
    EngineKind kind;
    const char* name;
    Opener open;
  };
  // Linux AIO comes first: for direct files, the only ones it gets by itself, it is as quick as io_uring and never
  // forbidden.
  constexpr Choice kChoices[] = {{EngineKind::kLinuxAio, "libaio", open_linux_aio},
                                 {EngineKind::kUring, "io_uring", open_uring},
                                 {EngineKind::kPosixAio, "posix_aio", open_posix_aio}};
  const bool forced = config.kind != EngineKind::kAutomatic;
  std::unique_ptr<Engine> engine(new Engine);
  std::unique_ptr<Queue> kernel;
  for (const Choice& choice : kChoices) {
    if (kernel || (forced && choice.kind != config.kind)) continue;
    auto queue = choice.open(config.depth);
    if (queue)
      kernel = std::move(*queue);
    else if (forced)
      return fail(within(choice.name, std::move(queue).error()));
    else
      engine->reason_ += std::string(choice.name) + ": " + queue.error().reason + "; ";
  }
  if (!kernel) return fail(Code::kIo, "no way to queue file I/O: %s", engine->reason_.c_str());
  Engine* self = engine.get();
  NIXL_ASSIGN(auto threads, open_threads(1024, config.num_threads, [self] {
                std::lock_guard lock(self->mutex_);
                if (!self->closing_ && self->advance_locked()) self->tell_locked();
              }));
  engine->adopt(std::move(kernel), std::move(threads), forced);
  NIXL_TRY(engine->watch_queues());
  return engine;
}

std::unique_ptr<Engine> Engine::with_queues(std::unique_ptr<Queue> kernel, std::unique_ptr<Queue> threads,
                                            bool forced) {
  std::unique_ptr<Engine> engine(new Engine);
  engine->adopt(std::move(kernel), std::move(threads), forced);
  return engine;
}

void Engine::adopt(std::unique_ptr<Queue> kernel, std::unique_ptr<Queue> threads, bool forced) {
  forced_ = forced;
  lanes_[kKernel].queue = std::move(kernel);
  lanes_[kThreads].queue = std::move(threads);
  for (Lane& lane : lanes_) {
    lane.slots.resize(lane.queue->depth());
    for (std::uint32_t i = lane.queue->depth(); i-- > 0;) lane.free.push_back(i);
  }
}

Result<void> Engine::watch_queues() {
  for (const Lane& lane : lanes_)
    if (lane.queue->event_fd() < 0) return {};
  event_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!event_) return fail(errno_error("epoll_create1", errno));
  told_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  epoll_event event = {};
  event.events = EPOLLIN;
  if (!told_ || ::epoll_ctl(event_.get(), EPOLL_CTL_ADD, told_.get(), &event) != 0)
    return fail(errno_error("eventfd of the workers", errno));
  for (const Lane& lane : lanes_) {
    if (::epoll_ctl(event_.get(), EPOLL_CTL_ADD, lane.queue->event_fd(), &event) != 0)
      return fail(errno_error("epoll_ctl for the queue " + std::string(lane.queue->name()), errno));
  }
  return {};
}

Engine::~Engine() {
  std::lock_guard lock(mutex_);
  closing_ = true;
}

std::string_view Engine::kernel_queue() const noexcept {
  return lanes_[kKernel].queue->name();
}

Result<std::unique_ptr<Request>> Engine::prepare(bool write, std::span<const Piece> pieces) {
  CutRules rules;
  rules.write = write;
  rules.buffered_lane = forced_ ? kKernel : kThreads;
  for (int i = 0; i < kNumLanes; ++i) rules.max_iov[i] = lanes_[i].queue->max_iov();
  rules.aligner = &aligning_copier;
  auto request = std::make_unique<Request>();
  NIXL_TRY(cut(pieces, rules, *request));
  for (const File* file : request->files) {
    if (write ? file->writable() : file->readable()) continue;
    return fail(Code::kInvalidArgument, "%s is open for %s only: it cannot be %s", file->name().c_str(),
                write ? "reading" : "writing", write ? "written" : "read");
  }
  for (int i = 0; i < kNumLanes; ++i) {
    if (request->lanes[i].jobs.empty()) continue;
    if (!request->queue_names.empty()) request->queue_names += "+";
    request->queue_names += lanes_[i].queue->name();
  }
  return request;
}

Result<Engine::State> Engine::start(Request& request) {
  if (request.state.load(std::memory_order_acquire) == State::kRunning)
    return fail(Code::kBusy, "the request is still running");
  for (const File* file : request.files) NIXL_TRY(file->check_lent());
  request.left = request.num_jobs();
  request.in_flight = 0;
  request.stopping = false;
  for (auto& lane : request.lanes) lane.next = 0;
  if (request.may_inline) run_inline(request);
  if (request.left == 0) {
    request.state.store(State::kDone, std::memory_order_release);
    return State::kDone;
  }
  std::lock_guard lock(mutex_);
  ++running_;
  request.state.store(State::kRunning, std::memory_order_relaxed);
  for (int i = 0; i < kNumLanes; ++i) {
    if (request.lanes[i].next >= request.lanes[i].jobs.size()) continue;
    request.lanes[i].queued = true;
    lanes_[i].runnable.push_back(&request);
    while (pump_locked(i)) {
    }
  }
  return State::kRunning;
}

// A small request that the page cache can serve costs less here than the way to another thread and back. What would
// block, or fails, is left to the workers.
void Engine::run_inline(Request& request) {
  auto& lane = request.lanes[kThreads];
  for (; lane.next < lane.jobs.size(); ++lane.next) {
    const Job& job = lane.jobs[lane.next];
    const Io io = {0, request.write, job.fd, job.offset, request.iovs.data() + job.first_iov, job.num_iov, nullptr};
    if (plain_call(io, request.write ? 0 : RWF_NOWAIT) != job.bytes) return;
    --request.left;
  }
}

Engine::State Engine::poll(Request& request) {
  State state = request.state.load(std::memory_order_acquire);
  if (state != State::kRunning) return state;
  progress();
  return request.state.load(std::memory_order_acquire);
}

const Error& Engine::error_of(const Request& request) noexcept {
  return request.error;
}

std::string Engine::path_of(const Request& request) {
  return request.staged ? "staged+" + request.queue_names : request.queue_names;
}

bool Engine::cancel(Request& request) noexcept {
  if (request.state.load(std::memory_order_acquire) != State::kRunning) return true;
  std::lock_guard lock(mutex_);
  if (request.state.load(std::memory_order_relaxed) != State::kRunning) return true;
  if (!request.stopping) {
    request.stopping = true;
    request.error = {Code::kCancelled, "cancelled by the caller"};
  }
  for (Lane& lane : lanes_)
    for (std::uint32_t i = 0; i < lane.slots.size(); ++i)
      if (lane.slots[i].request == &request) lane.queue->cancel(i);
  settle_locked(request);
  if (request.state.load(std::memory_order_relaxed) == State::kRunning) advance_locked();
  return request.state.load(std::memory_order_relaxed) != State::kRunning;
}

bool Engine::progress() noexcept {
  if (running_.load(std::memory_order_acquire) == 0) return false;
  bool moved = false;
  if (std::unique_lock lock(mutex_, std::try_to_lock); lock) moved = advance_locked();
  if (moved || !lanes_[kThreads].queue->help()) return moved;
  if (std::unique_lock lock(mutex_, std::try_to_lock); lock) advance_locked();
  return true;
}

// A worker has moved requests on, perhaps ended them: whoever sleeps, or is about to, has to look at them.
void Engine::tell_locked() noexcept {
  worked_ = true;
  const std::uint64_t one = 1;
  if (std::exchange(armed_, false)) (void)!::write(told_.get(), &one, sizeof one);
}

bool Engine::arm() noexcept {
  std::lock_guard lock(mutex_);
  std::uint64_t count = 0;
  if (told_) (void)!::read(told_.get(), &count, sizeof count);
  bool quiet = !std::exchange(worked_, false);
  for (Lane& lane : lanes_) quiet = lane.queue->arm() && lane.retry.empty() && quiet;
  armed_ = quiet && told_;
  return quiet;
}

bool Engine::advance_locked() noexcept {
  bool moved = false;
  Done done[kReapBatch];
  for (int i = 0; i < kNumLanes; ++i) {
    // Bounded, so that one caller does not end up working for all the others.
    for (int round = 0; round < 32; ++round) {
      const std::size_t count = lanes_[i].queue->reap(done);
      for (std::size_t k = 0; k < count; ++k) complete_locked(i, done[k]);
      const bool more = pump_locked(i);
      moved |= count > 0 || more;
      if (count < kReapBatch && !more) break;
    }
  }
  return moved;
}

Io Engine::io_of(int lane, std::uint32_t index) const noexcept {
  const Slot& slot = lanes_[lane].slots[index];
  const Job& job = slot.request->lanes[lane].jobs[slot.job];
  Io io = {index,       slot.request->write, slot.fd, job.offset + slot.done, slot.request->iovs.data() + job.first_iov,
           job.num_iov, job.copier};
  if (slot.done > 0) {
    io.iov = slot.rest.data();
    io.num_iov = static_cast<std::uint32_t>(slot.rest.size());
  }
  return io;
}

// Gives the queue one batch; true when it took some of it.
bool Engine::pump_locked(int lane_index) noexcept {
  Lane& lane = lanes_[lane_index];
  if (lane.retry.empty() && (lane.runnable.empty() || lane.free.empty())) return false;
  Io batch[kThreadBatch];
  const std::size_t most = lane_index == kKernel ? kKernelBatch : kThreadBatch;
  std::size_t count = 0;
  for (; count < most && !lane.retry.empty(); lane.retry.pop_back())
    batch[count++] = io_of(lane_index, lane.retry.back());
  while (count < most && !lane.runnable.empty() && !lane.free.empty()) {
    Request& request = *lane.runnable.front();
    auto& jobs = request.lanes[lane_index];
    for (std::size_t turn = 0; turn < kTurn && count < most && !lane.free.empty() && jobs.next < jobs.jobs.size();
         ++turn) {
      const std::uint32_t index = lane.free.back();
      lane.free.pop_back();
      Slot& slot = lane.slots[index];
      slot.request = &request;
      slot.job = static_cast<std::uint32_t>(jobs.next);
      slot.done = 0;
      slot.fd = jobs.jobs[jobs.next++].fd;
      ++request.in_flight;
      batch[count++] = io_of(lane_index, index);
    }
    lane.runnable.pop_front();
    jobs.queued = jobs.next < jobs.jobs.size();
    if (jobs.queued) lane.runnable.push_back(&request);
  }
  if (count == 0) return false;
  const auto taken = lane.queue->submit({batch, count});
  if (!taken) {
    refuse_locked(lane_index, {batch, count}, taken.error());
    return true;
  }
  for (std::size_t i = *taken; i < count; ++i) lane.retry.push_back(batch[i].slot);
  return *taken == count;
}

// The queue itself failed: it took none of these.
void Engine::refuse_locked(int lane, std::span<const Io> batch, const Error& error) noexcept {
  for (const Io& io : batch) {
    Slot& slot = lanes_[lane].slots[io.slot];
    Request& request = *slot.request;
    if (!request.stopping) request.error = error;
    request.stopping = true;
    slot.request = nullptr;
    lanes_[lane].free.push_back(io.slot);
    --request.in_flight;
    --request.left;
    settle_locked(request);
  }
}

void Engine::complete_locked(int lane_index, const Done& done) noexcept {
  Lane& lane = lanes_[lane_index];
  Slot& slot = lane.slots[done.slot];
  Request& request = *slot.request;
  const Job& job = request.lanes[lane_index].jobs[slot.job];
  const bool again = done.result == -EAGAIN || done.result == -EINTR;
  if (done.result > 0) slot.done += static_cast<std::uint64_t>(done.result);
  const bool complete = slot.done >= job.bytes;
  if (!complete && !request.stopping && (done.result > 0 || again)) {
    if (done.result > 0) rest_of(request, job, slot.done, slot.rest);
    const File& file = *request.files[job.file];
    // Direct I/O stops short at the end of the file, or in the middle of a block that only the page cache can continue.
    if (slot.done % std::max(1u, file.offset_align()) != 0)
      if (const auto twin = file.buffered_fd()) slot.fd = *twin;
    lane.retry.push_back(done.slot);
    return;
  }
  if (!complete && !request.stopping) {
    request.stopping = true;
    request.error = job_error(request, job, slot.done, done.result);
  }
  slot.request = nullptr;
  lane.free.push_back(done.slot);
  --request.in_flight;
  --request.left;
  settle_locked(request);
}

// Ends a request that has nothing left to wait for. After the store of its state the owner may destroy it.
void Engine::settle_locked(Request& request) noexcept {
  if (request.stopping) {
    for (int i = 0; i < kNumLanes; ++i) {
      Lane& lane = lanes_[i];
      auto& jobs = request.lanes[i];
      request.left -= jobs.jobs.size() - jobs.next;
      jobs.next = jobs.jobs.size();
      if (jobs.queued) std::erase(lane.runnable, &request);
      jobs.queued = false;
      std::erase_if(lane.retry, [&](std::uint32_t index) {
        if (lane.slots[index].request != &request) return false;
        lane.slots[index].request = nullptr;
        lane.free.push_back(index);
        --request.in_flight;
        --request.left;
        return true;
      });
    }
  }
  if (request.left > 0) return;
  --running_;
  request.state.store(request.stopping ? State::kFailed : State::kDone, std::memory_order_release);
}

}  // namespace nixl::core::fileio
