#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <map>
#include <random>

#include "http/object_request.h"

namespace nixl::core::http {
namespace {

constexpr std::uint64_t kMaxParts = 10'000;

void append(Body& body, std::byte* memory, std::uint64_t bytes) {
  if (bytes == 0) return;
  if (!body.empty() && static_cast<std::byte*>(body.back().iov_base) + body.back().iov_len == memory)
    body.back().iov_len += bytes;
  else
    body.push_back({memory, static_cast<std::size_t>(bytes)});
}

std::uint64_t size_of(const Body& body) {
  std::uint64_t sum = 0;
  for (const iovec& part : body) sum += part.iov_len;
  return sum;
}

// The body in pieces of `part_bytes`.
std::vector<Body> split(const Body& body, std::uint64_t part_bytes) {
  std::vector<Body> parts;
  std::uint64_t room = 0;
  for (iovec piece : body)
    while (piece.iov_len > 0) {
      if (room == 0) {
        parts.emplace_back();
        room = part_bytes;
      }
      const std::uint64_t n = std::min<std::uint64_t>(room, piece.iov_len);
      append(parts.back(), static_cast<std::byte*>(piece.iov_base), n);
      piece.iov_base = static_cast<std::byte*>(piece.iov_base) + n;
      piece.iov_len -= n;
      room -= n;
    }
  return parts;
}

Nanoseconds pause_before(unsigned repetition, Nanoseconds first) {
  thread_local std::minstd_rand random(std::random_device{}());
  const Nanoseconds pause = first << std::min(repetition, 5u);
  return pause +
         static_cast<Nanoseconds>(random() % 1000) * pause / 2000;  // so that many callers do not come back at once
}

}  // namespace

// The host buffers that staged calls go through, all of one size; kept for the next.
class ObjectEngine::Buffers {
 public:
  explicit Buffers(std::size_t bytes) : bytes_(bytes) {}
  ~Buffers() {
    for (const auto& [copier, idle] : idle_)
      for (void* buffer : idle) copier->free(buffer, bytes_);
  }
  void* take(Copier* copier) {
    {
      const std::lock_guard lock(mutex_);
      if (auto& idle = idle_[copier]; !idle.empty()) {
        void* const buffer = idle.back();
        idle.pop_back();
        return buffer;
      }
    }
    return copier->allocate(bytes_);
  }
  void give_back(Copier* copier, void* buffer) {
    const std::lock_guard lock(mutex_);
    idle_[copier].push_back(buffer);
  }

 private:
  const std::size_t bytes_;
  std::mutex mutex_;
  std::map<Copier*, std::vector<void*>> idle_;
};

struct ObjectEngine::Task {
  ObjectRequest* request = nullptr;  // null: an abort, which nobody waits for
  Planned what{};
  const ObjectUnit* unit = nullptr;
  ObjectUnit own;  // of an abort
  unsigned repeated = 0;
  CallId call = 0;
  void* buffer = nullptr;  // of a staged unit; kept over repetitions
  std::optional<Error> stage_error;
};

ObjectEngine::ObjectEngine() = default;

Result<std::unique_ptr<ObjectEngine>> ObjectEngine::open(std::unique_ptr<Client> client,
                                                         std::unique_ptr<Protocol> protocol,
                                                         const ObjectEngineConfig& config) {
  std::unique_ptr<ObjectEngine> engine(new ObjectEngine);
  engine->protocol_ = std::move(protocol);
  engine->config_ = config;
  engine->buffers_ = std::make_unique<Buffers>(config.staged_bytes);
  engine->client_ = std::move(client);
  engine->event_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!engine->event_) return fail(errno_error("eventfd", errno));
  return engine;
}

ObjectEngine::~ObjectEngine() = default;

Result<std::unique_ptr<ObjectRequest>> ObjectEngine::prepare(bool write, std::span<const ObjectPiece> pieces) {
  auto request = std::make_unique<ObjectRequest>();
  request->write = write;
  if (!write) {
    for (ObjectPiece piece : pieces) {
      if (piece.bytes == 0) continue;
      ObjectUnit* last = request->units.empty() ? nullptr : &request->units.back();
      const std::uint64_t most = piece.copier ? config_.staged_bytes : config_.part_bytes;
      request->staged |= piece.copier != nullptr;
      do {
        const std::uint64_t have = last ? size_of(last->body) : 0;
        if (!last || last->key != piece.key || last->copier != piece.copier || last->offset + have != piece.offset ||
            have >= most) {
          request->units.push_back({std::string(piece.key), piece.offset, {}, piece.copier});
          last = &request->units.back();
          continue;
        }
        const std::uint64_t n = std::min(piece.bytes, most - have);
        append(last->body, piece.memory, n);
        piece.offset += n;
        piece.memory += n;
        piece.bytes -= n;
      } while (piece.bytes > 0);
    }
    return request;
  }
  std::map<std::string_view, std::vector<const ObjectPiece*>> by_key;
  for (const ObjectPiece& piece : pieces) by_key[piece.key].push_back(&piece);
  for (auto& [key, list] : by_key) {
    std::stable_sort(list.begin(), list.end(), [](const auto* a, const auto* b) { return a->offset < b->offset; });
    ObjectUnit unit{std::string(key)};
    unit.copier = list.front()->copier;
    request->staged |= unit.copier != nullptr;
    std::uint64_t end = 0;
    for (const ObjectPiece* piece : list) {
      if (piece->offset != end)
        return fail(
            Code::kInvalidArgument,
            "object \"%s\": a write replaces the whole object, so its pieces must follow each other from offset 0; "
            "there is one at offset %llu where %llu was expected",
            unit.key.c_str(), static_cast<unsigned long long>(piece->offset), static_cast<unsigned long long>(end));
      if (piece->copier != unit.copier)
        return fail(
            Code::kInvalidArgument,
            "object \"%s\": its pieces lie in the memory of two GPUs; write it from one of them, or in parts of "
            "its own",
            unit.key.c_str());
      append(unit.body, piece->memory, piece->bytes);
      end += piece->bytes;
    }
    const std::uint64_t part = unit.copier ? config_.staged_bytes : config_.part_bytes;
    if (unit.copier && end > part * kMaxParts)
      return fail(Code::kInvalidArgument, "object \"%s\": %llu bytes of GPU memory, at most %llu go into one object",
                  unit.key.c_str(), static_cast<unsigned long long>(end),
                  static_cast<unsigned long long>(part * kMaxParts));
    if (end > (unit.copier ? part : config_.whole_bytes))
      unit.parts = split(unit.body, std::max(part, (end + kMaxParts - 1) / kMaxParts));
    request->units.push_back(std::move(unit));
  }
  return request;
}

Result<ObjectEngine::State> ObjectEngine::start(ObjectRequest& request) {
  const std::lock_guard lock(mutex_);
  if (request.state == State::kRunning) return fail(Code::kBusy, "the request is still running");
  request.stopping = false;
  request.units_left = request.units.size();
  request.ready.clear();
  if (request.units.empty()) {
    request.state = State::kDone;
    return State::kDone;
  }
  for (std::uint32_t i = 0; i < request.units.size(); ++i) {
    ObjectUnit& unit = request.units[i];
    unit.part_ids.assign(unit.parts.size(), "");
    unit.parts_left = unit.parts.size();
    unit.begun = false;
    unit.upload.clear();
    const Step step = !request.write ? Step::kGet : unit.parts.empty() ? Step::kPut : Step::kBegin;
    if (step == Step::kBegin && !protocol_->begin_upload(unit.key)) {
      NIXL_ASSIGN(unit.upload, protocol_->upload_id({}));
      for (std::uint32_t part = 0; part < unit.parts.size(); ++part) request.ready.push_back({Step::kPart, i, part});
    } else {
      request.ready.push_back({step, i, 0});
    }
  }
  request.state = State::kRunning;
  waiting_.push_back(&request);
  pump_locked();
  return State::kRunning;
}

ObjectEngine::State ObjectEngine::poll(const ObjectRequest& request) const noexcept {
  return request.state;
}
const Error& ObjectEngine::error_of(const ObjectRequest& request) noexcept {
  return request.error;
}

bool ObjectEngine::cancel(ObjectRequest& request) noexcept {
  const std::lock_guard lock(mutex_);
  if (request.state != State::kRunning) return true;
  if (!request.stopping) stop_locked(request, {Code::kCancelled, "cancelled by the caller"});
  settle_locked(request);
  return request.state != State::kRunning;
}

bool ObjectEngine::drain() noexcept {
  std::uint64_t count = 0;
  return ::read(event_.get(), &count, sizeof count) > 0;
}

void ObjectEngine::pump_locked() {
  while (num_calls_ < config_.max_calls && !waiting_.empty()) {
    ObjectRequest& request = *waiting_.front();
    if (request.staged && num_calls_ >= config_.max_staged_calls) return;
    waiting_.pop_front();
    auto task = std::make_shared<Task>();
    task->request = &request;
    task->what = request.ready.front();
    task->unit = &request.units[task->what.unit];
    request.ready.pop_front();
    if (!request.ready.empty()) waiting_.push_back(&request);
    request.active.push_back(task);
    ++num_calls_;
    launch_locked(task, 0);
  }
}

void ObjectEngine::launch_locked(const std::shared_ptr<Task>& task, Nanoseconds delay) {
  // The lock is held, so the callback cannot look at `call` before it is set.
  task->call = client_->start([this, task] { return make_call(*task); }, delay,
                              [this, task](Outcome outcome) { ended(task, std::move(outcome)); });
}

// The memory itself, or the task's buffer with, on a write, what the memory holds now.
Result<Body> ObjectEngine::stage(Task& task, const Body& memory) {
  Copier* const copier = task.unit->copier;
  if (!copier) return memory;
  if (!task.buffer) task.buffer = buffers_->take(copier);
  if (!task.buffer) return fail(Code::kIo, "no pinned host memory left to copy through");
  if (task.what.step != Step::kGet) NIXL_TRY(copier->to_host(task.buffer, memory));
  return Body{{task.buffer, size_of(memory)}};
}

Result<void> ObjectEngine::unstage(const Task& task) const {
  const ObjectUnit& unit = *task.unit;
  if (!unit.copier || task.what.step != Step::kGet) return {};
  return unit.copier->from_host(unit.body, task.buffer, size_of(unit.body));
}

Call ObjectEngine::make_call(Task& task) {
  const ObjectUnit& unit = *task.unit;
  Call call;
  Body body;
  if (const Step step = task.what.step; step == Step::kGet || step == Step::kPut || step == Step::kPart) {
    auto staged = stage(task, step == Step::kPart ? unit.parts[task.what.part] : unit.body);
    if (!staged) {
      task.stage_error = staged.error();
      return call;  // without a URL it ends at once
    }
    body = std::move(*staged);
  }
  switch (task.what.step) {
    case Step::kGet:
      call = protocol_->get(unit.key, unit.offset, size_of(body));
      call.sink = std::move(body);
      break;
    case Step::kPut:
      call = protocol_->put(unit.key, body);
      break;
    case Step::kBegin:
      call = *protocol_->begin_upload(unit.key);
      break;
    case Step::kPart:
      call = protocol_->put_part(unit.key, unit.upload, task.what.part + 1, body);
      break;
    case Step::kFinish:
      call = protocol_->finish_upload(unit.key, unit.upload, unit.part_ids);
      break;
    case Step::kAbort:
      call = *protocol_->abort_upload(unit.key, unit.upload);
      break;
  }
  call.stall_ns = config_.stall_ns;
  return call;
}

// nullopt: it worked.
std::optional<Error> ObjectEngine::judge(const Task& task, const Outcome& outcome, bool* repeatable) const {
  const Reply& reply = outcome.reply;
  *repeatable = outcome.failed && outcome.transient && !task.stage_error;
  const char* method = task.what.step == Step::kGet ? "GET" : "PUT";
  const std::string what =
      (task.stage_error ? method : outcome.call.method) + " of object \"" + task.unit->key + "\": ";
  if (task.stage_error) return within(what + "copy through host memory", *task.stage_error);
  if (outcome.failed) return outcome.error;
  if (!reply.ok()) {
    constexpr int kTemporary[] = {408, 429, 500, 502, 503, 504};
    *repeatable = std::find(std::begin(kTemporary), std::end(kTemporary), reply.status) != std::end(kTemporary) ||
                  protocol_->worth_repeating(reply);
    return Error{Code::kIo, what + "HTTP " + std::to_string(reply.status) + " " + protocol_->error_text(reply)};
  }
  if (task.what.step == Step::kGet) {
    const std::uint64_t wanted = size_of(task.unit->body), offset = task.unit->offset;
    if (reply.status != 206 && offset > 0)
      return Error{Code::kIo, what + "the server ignored the range and answered " + std::to_string(reply.status)};
    if (reply.received != wanted)
      return Error{Code::kIo, what + "the object ends at byte " + std::to_string(offset + reply.received) + ", " +
                                  std::to_string(wanted) + " bytes at offset " + std::to_string(offset) +
                                  " were asked for"};
  }
  if (auto right = protocol_->check(outcome.call, reply); !right) {
    *repeatable = true;
    return within(what.substr(0, what.size() - 2), right.error());
  }
  if (auto copied = unstage(task); !copied) return within(what + "copy through host memory", copied.error());
  return std::nullopt;
}

void ObjectEngine::ended(const std::shared_ptr<Task>& task, Outcome outcome) noexcept {
  bool repeatable = false;
  std::optional<Error> error = judge(*task, outcome, &repeatable);
  const std::lock_guard lock(mutex_);
  ObjectRequest* request = task->request;
  if (!request) return;
  if (error && repeatable && !request->stopping && task->repeated < config_.max_repeats) {
    launch_locked(task, pause_before(task->repeated++, config_.first_pause));
    return;
  }
  std::erase(request->active, task);
  --num_calls_;
  if (task->buffer) buffers_->give_back(task->unit->copier, task->buffer);
  if (!error) {
    succeeded_locked(*task, outcome.reply);
  } else if (!request->stopping) {
    if (task->repeated > 0) error->reason += " (tried " + std::to_string(task->repeated + 1) + " times)";
    stop_locked(*request, std::move(*error));
  }
  settle_locked(*request);
  pump_locked();
}

void ObjectEngine::succeeded_locked(const Task& task, const Reply& reply) {
  ObjectRequest& request = *task.request;
  ObjectUnit& unit = request.units[task.what.unit];
  const bool was_empty = request.ready.empty();
  switch (task.what.step) {
    case Step::kBegin: {
      auto id = protocol_->upload_id(reply);
      if (!id) {
        if (!request.stopping) stop_locked(request, id.error());
        return;
      }
      unit.upload = std::move(*id);
      unit.begun = true;
      if (request.stopping) return;
      for (std::uint32_t part = 0; part < unit.parts.size(); ++part)
        request.ready.push_back({Step::kPart, task.what.unit, part});
      break;
    }
    case Step::kPart:
      unit.part_ids[task.what.part] = protocol_->part_id(task.what.part + 1, reply);
      if (--unit.parts_left == 0 && !request.stopping) request.ready.push_back({Step::kFinish, task.what.unit});
      break;
    case Step::kFinish:
      unit.begun = false;
      [[fallthrough]];
    default:
      --request.units_left;
  }
  if (was_empty && !request.ready.empty()) waiting_.push_back(&request);
}

void ObjectEngine::stop_locked(ObjectRequest& request, Error error) {
  request.stopping = true;
  request.error = std::move(error);
  request.ready.clear();
  std::erase(waiting_, &request);
  for (const auto& task : request.active) client_->cancel(static_cast<Task*>(task.get())->call);
}

// Ends a request for which nothing is on its way any more. After the store of its state the owner may destroy it.
void ObjectEngine::settle_locked(ObjectRequest& request) {
  if (request.state != State::kRunning || !request.active.empty()) return;
  if (!request.stopping && request.units_left > 0) return;
  if (request.stopping)
    for (ObjectUnit& unit : request.units) {
      if (!unit.begun || !protocol_->abort_upload(unit.key, unit.upload)) continue;
      auto task = std::make_shared<Task>();
      task->what.step = Step::kAbort;
      task->own.key = unit.key;
      task->own.upload = unit.upload;
      task->unit = &task->own;
      launch_locked(task, 0);
    }
  request.state = request.stopping ? State::kFailed : State::kDone;
  const std::uint64_t one = 1;
  (void)!::write(event_.get(), &one, sizeof one);
}

Result<std::vector<bool>> ObjectEngine::exist(std::span<const std::string> keys, Deadline deadline) {
  struct Answers {
    std::mutex mutex;
    std::condition_variable all;
    std::vector<bool> there;
    std::size_t left = 0;
    std::optional<Error> error;
  } answers;
  answers.there.resize(keys.size());
  answers.left = keys.size();
  for (std::size_t i = 0; i < keys.size(); ++i) {
    const std::string& key = keys[i];
    const auto make = [this, &key, deadline] {
      Call call = protocol_->head(key);
      call.deadline = deadline;
      return call;
    };
    client_->start(make, 0, [this, &answers, &key, i](const Outcome& outcome) {
      const std::lock_guard lock(answers.mutex);
      if (outcome.failed)
        answers.error = outcome.error;
      else if (!outcome.reply.ok() && outcome.reply.status != 404)
        answers.error = {Code::kIo, "HEAD of object \"" + key + "\": HTTP " + std::to_string(outcome.reply.status) +
                                        " " + protocol_->error_text(outcome.reply)};
      answers.there[i] = !outcome.failed && outcome.reply.ok();
      if (--answers.left == 0) answers.all.notify_one();
    });
  }
  std::unique_lock lock(answers.mutex);
  answers.all.wait(lock, [&] { return answers.left == 0; });
  if (answers.error) return fail(*answers.error);
  return answers.there;
}

}  // namespace nixl::core::http
