#include "backends/gds/gpu_queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace nixl::core::gds {
namespace {

constexpr std::uint64_t kSmallRequest = 1 << 20;  // up to here a batch costs more than it gains
const Error kFine{};

bool failed(const Error& error) {
  return !error.reason.empty();
}

Error piece_error(const GpuRequest& request, const GpuPiece& piece, const std::string& why) {
  return {Code::kIo, std::string(request.write ? "write" : "read") + " of " + std::to_string(piece.bytes) +
                         " bytes at offset " + std::to_string(piece.offset) + " of " + piece.file->file().name() +
                         ": " + why};
}

}  // namespace

Result<std::unique_ptr<GpuFile>> GpuFile::open(const Cufile& cufile, std::shared_ptr<fileio::File> file) {
  std::unique_ptr<GpuFile> opened(new GpuFile(cufile, std::move(file)));
  FileDescription description;
  description.handle = nullptr;
  description.fd = opened->file_->fd();
  const CufileError error = cufile.register_file(&opened->handle_, &description);
  if (error.error != 0) {
    const std::string name = opened->file_->name();
    (void)opened.release();  // there is no handle to give back
    return fail(Code::kIo, "cuFileHandleRegister of %s: %s", name.c_str(), Cufile::text_of(error).c_str());
  }
  return opened;
}

struct GpuQueue::Work {
  GpuRequest* request = nullptr;
  std::size_t first = 0, count = 0;
  bool batch = false;
};

GpuQueue::GpuQueue(const Cufile& cufile, const GpuQueueConfig& config, Fd event)
    : cufile_(cufile), config_(config), owner_(::getpid()), event_(std::move(event)) {}

GpuQueue::~GpuQueue() {
  if (::getpid() != owner_) {  // after a fork the threads do not exist
    for (std::thread& thread : threads_) thread.detach();
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Result<std::unique_ptr<GpuRequest>> GpuQueue::prepare(bool write, std::vector<GpuPiece> pieces) {
  auto request = std::make_unique<GpuRequest>();
  request->write = write;
  std::uint64_t total = 0;
  for (GpuPiece& piece : pieces) {
    const fileio::File& file = piece.file->file();
    if (!(write ? file.writable() : file.readable()))
      return fail(Code::kInvalidArgument, "%s is open for %s only", file.name().c_str(), write ? "reading" : "writing");
    total += piece.bytes;
    // Neighbours in file and memory become one; what is longer than a piece may be is cut.
    if (!request->pieces.empty()) {
      GpuPiece& last = request->pieces.back();
      if (last.file == piece.file && last.base == piece.base && last.offset + last.bytes == piece.offset &&
          last.base_offset + last.bytes == piece.base_offset && last.bytes + piece.bytes <= config_.max_piece_bytes) {
        last.bytes += piece.bytes;
        continue;
      }
    }
    while (piece.bytes > 0) {
      GpuPiece part = piece;
      part.bytes = std::min(piece.bytes, config_.max_piece_bytes);
      piece.offset += part.bytes;
      piece.base_offset += part.bytes;
      piece.bytes -= part.bytes;
      request->pieces.push_back(std::move(part));
    }
  }
  request->batched = config_.batch_pool_size > 0 && total > kSmallRequest && request->pieces.size() > 1;
  return request;
}

Result<GpuQueue::State> GpuQueue::start(GpuRequest& request) {
  if (request.state == State::kRunning) return fail(Code::kBusy, "the request is still running");
  for (std::size_t i = 0; i < request.pieces.size(); ++i)
    if (i == 0 || request.pieces[i].file != request.pieces[i - 1].file)
      NIXL_TRY(request.pieces[i].file->file().check_lent());
  request.next = request.in_flight = 0;
  request.left = request.pieces.size();
  request.stopping = false;
  if (request.left == 0) {
    request.state = State::kDone;
    return State::kDone;
  }
  const std::lock_guard lock(mutex_);
  for (unsigned i = static_cast<unsigned>(threads_.size());
       i < std::min<std::size_t>(config_.num_threads, request.left); ++i)
    try {
      threads_.emplace_back([this] { run(); });
    } catch (const std::system_error& e) {
      if (threads_.empty()) return fail(errno_error("start an I/O thread", e.code().value()));
      break;
    }
  request.state = State::kRunning;
  waiting_.push_back(&request);
  wake_.notify_all();
  return State::kRunning;
}

GpuQueue::State GpuQueue::poll(const GpuRequest& request) noexcept {
  return request.state;
}
const Error& GpuQueue::error_of(const GpuRequest& request) noexcept {
  return request.error;
}

bool GpuQueue::cancel(GpuRequest& request) noexcept {
  const std::lock_guard lock(mutex_);
  if (request.state != State::kRunning) return true;
  if (!request.stopping) {
    request.stopping = true;
    request.error = {Code::kCancelled, "cancelled by the caller"};
  }
  settle_locked(request);
  return request.state != State::kRunning;
}

bool GpuQueue::drain() noexcept {
  std::uint64_t count = 0;
  return ::read(event_.get(), &count, sizeof count) > 0;
}

void GpuQueue::take_locked(Work& work) {
  GpuRequest& request = *waiting_.front();
  waiting_.pop_front();
  work.request = &request;
  work.first = request.next;
  work.batch = request.batched && num_batches_ < config_.batch_pool_size;
  work.count = work.batch ? std::min<std::size_t>(config_.batch_limit, request.pieces.size() - request.next) : 1;
  request.next += work.count;
  request.in_flight += work.count;
  num_batches_ += work.batch;
  if (request.next < request.pieces.size()) waiting_.push_back(&request);
}

void GpuQueue::run() {
  BatchHandle batch = nullptr;
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [&] { return stop_ || !waiting_.empty(); });
    if (stop_) break;
    Work work;
    take_locked(work);
    lock.unlock();
    Error error = kFine;
    if (auto ready = cufile_.driver->use(work.request->pieces[work.first].gpu); !ready) error = ready.error();
    if (work.batch && !batch && cufile_.batch_setup(&batch, config_.batch_limit).error != 0) batch = nullptr;
    if (failed(error)) {
    } else if (work.batch && batch) {
      error = move_batch(work, batch);
      if (failed(error)) {  // a batch that went wrong may still hold entries: it is not used again
        cufile_.batch_destroy(batch);
        batch = nullptr;
      }
    } else {
      for (std::size_t i = 0; i < work.count && !failed(error); ++i) error = move(*work.request, work.first + i, 0);
    }
    lock.lock();
    num_batches_ -= work.batch;
    GpuRequest& request = *work.request;
    request.in_flight -= work.count;
    request.left -= work.count;
    if (failed(error) && !request.stopping) {
      request.stopping = true;
      request.error = std::move(error);
    }
    settle_locked(request);
  }
  lock.unlock();
  if (batch) cufile_.batch_destroy(batch);
}

// Ends a request that nothing works on any more. After the store of its state the owner may destroy it.
void GpuQueue::settle_locked(GpuRequest& request) {
  if (request.stopping) {
    std::erase(waiting_, &request);
    request.left = request.in_flight;
    request.next = request.pieces.size();
  }
  if (request.left > 0) return;
  request.state = request.stopping ? State::kFailed : State::kDone;
  const std::uint64_t one = 1;
  (void)!::write(event_.get(), &one, sizeof one);
}

Error GpuQueue::move(const GpuRequest& request, std::size_t index, std::uint64_t done) const {
  const GpuPiece& piece = request.pieces[index];
  while (done < piece.bytes) {
    const auto file_offset = static_cast<off_t>(piece.offset + done),
               base_offset = static_cast<off_t>(piece.base_offset + done);
    errno = 0;
    const ssize_t got =
        request.write ? cufile_.write(piece.file->handle(), piece.base, piece.bytes - done, file_offset, base_offset)
                      : cufile_.read(piece.file->handle(), piece.base, piece.bytes - done, file_offset, base_offset);
    if (got > 0) {
      done += static_cast<std::uint64_t>(got);
    } else if (got == -1 && errno == EINTR) {
      continue;
    } else if (got == 0) {
      return piece_error(
          request, piece,
          request.write ? "nothing more was taken" : "the file ends at offset " + std::to_string(piece.offset + done));
    } else {
      return piece_error(request, piece, got == -1 ? errno_text(errno) : Cufile::text_of({static_cast<int>(-got), 0}));
    }
  }
  return kFine;
}

Error GpuQueue::move_batch(Work& work, BatchHandle batch) const {
  GpuRequest& request = *work.request;
  std::vector<BatchEntry> entries(work.count);
  for (std::size_t i = 0; i < work.count; ++i) {
    const GpuPiece& piece = request.pieces[work.first + i];
    entries[i].io = {piece.base, static_cast<off_t>(piece.offset), static_cast<off_t>(piece.base_offset), piece.bytes};
    entries[i].file = piece.file->handle();
    entries[i].write = request.write;
    entries[i].cookie = reinterpret_cast<void*>(i);
  }
  const auto count = static_cast<unsigned>(work.count);
  if (const CufileError error = cufile_.batch_submit(batch, count, entries.data(), 0); error.error != 0)
    return piece_error(request, request.pieces[work.first], "cuFileBatchIOSubmit: " + Cufile::text_of(error));
  std::vector<BatchEvent> events(work.count);
  Error first = kFine;
  for (std::size_t done = 0; done < work.count;) {
    unsigned got = count;
    timespec wait = {0, 100'000'000};
    if (const CufileError error = cufile_.batch_status(batch, 1, &got, events.data(), &wait); error.error != 0)
      return piece_error(request, request.pieces[work.first], "cuFileBatchIOGetStatus: " + Cufile::text_of(error));
    for (unsigned i = 0; i < got; ++i) {
      if (events[i].status == kPending || events[i].status == kWaiting) continue;
      ++done;
      const std::size_t index = work.first + reinterpret_cast<std::size_t>(events[i].cookie);
      const GpuPiece& piece = request.pieces[index];
      const auto moved = static_cast<ssize_t>(events[i].result);
      Error error = kFine;
      if (events[i].status != kComplete || moved < 0)
        error = piece_error(
            request, piece,
            "batch entry ended with status " + std::to_string(events[i].status) + ", result " + std::to_string(moved));
      else if (static_cast<std::uint64_t>(moved) < piece.bytes)
        error = move(request, index, static_cast<std::uint64_t>(moved));  // a short one goes on by plain calls
      if (failed(error) && !failed(first)) first = std::move(error);
    }
  }
  return first;
}

}  // namespace nixl::core::gds
