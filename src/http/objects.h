// ObjectEngine: moves lists of pieces between memory and objects of a store that speaks HTTP. It joins neighbours,
// splits large objects into parts that travel at once, repeats what may succeed when repeated, and tells which object
// failed and why. What the requests look like is a Protocol's business (S3, Azure).
//
// Threads: everything may be called from any thread; calls on one ObjectRequest are serialised by the caller.
#pragma once
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/copier.h"
#include "base/fd.h"
#include "http/client.h"

namespace nixl::core::http {

using Body = std::vector<iovec>;

// Makes calls and reads replies; called from any threads. A call is made anew for every attempt, so signatures are
// fresh.
class Protocol {
 public:
  virtual ~Protocol() = default;
  virtual Call get(const std::string& key, std::uint64_t offset, std::uint64_t bytes) const = 0;
  virtual Call put(const std::string& key, const Body& body) const = 0;
  virtual Call head(const std::string& key) const = 0;
  // Upload in parts: begin (stores that need one), the parts in any order, then finish, or abort.
  virtual std::optional<Call> begin_upload(const std::string& key) const = 0;
  virtual Result<std::string> upload_id(const Reply& reply) const = 0;  // of begin's reply; no begin: of an empty one
  virtual Call put_part(const std::string& key, const std::string& upload, unsigned number, const Body& body) const = 0;
  virtual std::string part_id(unsigned number, const Reply& reply) const = 0;
  virtual Call finish_upload(const std::string& key, const std::string& upload,
                             const std::vector<std::string>& parts) const = 0;
  virtual std::optional<Call> abort_upload(const std::string& key, const std::string& upload) const = 0;
  // After a 2xx reply: is what came right (checksums, an error inside the body)?
  virtual Result<void> check(const Call& call, const Reply& reply) const = 0;
  // The store's own code and text in a reply that is not 2xx.
  virtual std::string error_text(const Reply& reply) const = 0;
  // Statuses that every store repeats (408, 429, 5xx) need not be named here.
  virtual bool worth_repeating(const Reply& reply) const = 0;
};

struct ObjectPiece {
  std::string_view key;  // stays valid during prepare() only
  std::uint64_t offset = 0;
  std::byte* memory = nullptr;
  std::uint64_t bytes = 0;
  Copier* copier = nullptr;  // memory that sockets cannot use in place; outlives the engine
};

struct ObjectEngineConfig {
  unsigned max_calls = 64;               // on their way at once
  std::uint64_t part_bytes = 16 << 20;   // objects are read and written in pieces of this
  std::uint64_t whole_bytes = 64 << 20;  // objects up to this are written in one piece
  // The same two for memory behind a Copier: a part is one buffer, and so many calls at once have one.
  std::uint64_t staged_bytes = 8 << 20;
  unsigned max_staged_calls = 16;
  unsigned max_repeats = 5;
  Nanoseconds first_pause = 100'000'000;  // before the first repetition; doubles up to 32 times this
  Nanoseconds stall_ns = 30'000'000'000;
};

class ObjectRequest;

class ObjectEngine {
 public:
  static Result<std::unique_ptr<ObjectEngine>> open(std::unique_ptr<Client> client, std::unique_ptr<Protocol> protocol,
                                                    const ObjectEngineConfig& config);
  ~ObjectEngine();

  // Writes replace whole objects: the pieces of a key must follow each other from offset 0, else kInvalidArgument.
  Result<std::unique_ptr<ObjectRequest>> prepare(bool write, std::span<const ObjectPiece> pieces);

  enum class State { kIdle, kRunning, kDone, kFailed };
  Result<State> start(ObjectRequest& request);
  State poll(const ObjectRequest& request) const noexcept;
  static const Error& error_of(const ObjectRequest& request) noexcept;
  // True when it has ended; from then on memory is untouched.
  bool cancel(ObjectRequest& request) noexcept;

  // Which of the keys exist; asked at once.
  Result<std::vector<bool>> exist(std::span<const std::string> keys, Deadline deadline);

  // Readable when requests ended since the last drain().
  int event_fd() const noexcept { return event_.get(); }
  bool drain() noexcept;  // true when some had

 private:
  struct Task;
  class Buffers;
  ObjectEngine();
  void pump_locked();
  void launch_locked(const std::shared_ptr<Task>& task, Nanoseconds delay);
  Call make_call(Task& task);
  Result<Body> stage(Task& task, const Body& memory);
  Result<void> unstage(const Task& task) const;
  void ended(const std::shared_ptr<Task>& task, Outcome outcome) noexcept;
  std::optional<Error> judge(const Task& task, const Outcome& outcome, bool* repeatable) const;
  void succeeded_locked(const Task& task, const Reply& reply);
  void stop_locked(ObjectRequest& request, Error error);
  void settle_locked(ObjectRequest& request);

  std::unique_ptr<Protocol> protocol_;
  ObjectEngineConfig config_;
  Fd event_;
  std::mutex mutex_;
  unsigned num_calls_ = 0;
  std::deque<ObjectRequest*> waiting_;  // have tasks not yet started; served in turn
  std::unique_ptr<Buffers> buffers_;
  std::unique_ptr<Client> client_;  // last: its callbacks use the rest
};

}  // namespace nixl::core::http
