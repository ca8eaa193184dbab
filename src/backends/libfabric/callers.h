// Those who call us: where they are answered, and the notifications that they send. Under the engine's lock.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "backends/libfabric/engine.h"
#include "contract/backend.h"

namespace nixl::core::libfabric {

class Callers {
 public:
  Callers(Engine& engine, std::uint64_t incarnation) : engine_(&engine), incarnation_(incarnation) {}
  ~Callers();

  // Answers over the rail on which the hello came, a caller whose link broke after `first`. kMismatch: its address is none.
  Result<void> hello_locked(Rail& rail, const Hello& hello, const std::vector<std::string>& first);
  // A complete notification is appended to `ready`.
  void notify_locked(const Notify& notify, std::vector<Notification>& ready);
  // Answered by kPong or kGap.
  void ping_locked(const LinkWord& word);
  // The caller's link ends.
  void close_locked(const LinkWord& word);
  // Tells everybody.
  void tell_all_locked(const std::string& bytes);
  bool idle_locked() const;
  // Forgets those whom nothing reaches; the time of the next look.
  Nanoseconds tick_locked(Nanoseconds now);

 private:
  using Key = std::pair<std::uint64_t, std::uint64_t>;  // incarnation, link
  struct Path {
    std::string address;
    std::unique_ptr<Outbox> outbox;
  };
  struct Caller {
    std::string name;
    std::map<std::uint32_t, Path> paths;
    std::uint32_t control = 0, attempt = 0;  // the path that the last attempt to connect came by first
    std::string partial;                     // of the notification that is being received
  };

  Result<Outbox*> path_locked(const Key& key, Caller& caller, Rail& rail, const Hello& hello);
  void drop_path_locked(const Key& key, std::uint32_t path);
  static void end_path_locked(Path& path);
  Outbox* control_locked(const LinkWord& word);
  void tell_gap_locked(const Key& key);

  Engine* const engine_;
  const std::uint64_t incarnation_;
  std::map<Key, Caller> callers_;
  std::map<Key, std::uint64_t> next_sequence_;  // outlives the caller: it may call again
};

}  // namespace nixl::core::libfabric
