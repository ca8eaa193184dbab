// Attempt: one connect from the card in the store to READY (docs/membership.md). Runs on the thread that called
// connect.
#pragma once
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "contract/store.h"
#include "ep/group/messages.h"
#include "ep/group/switchboard.h"
#include "ep/path.h"

namespace nixl::core::ep {

struct GroupOptions {
  int rank = 0;
  std::uint32_t incarnation = 0;
  int experts_per_rank = 0;
  Nanoseconds connect_timeout_ns = 300'000'000'000;
};

class Attempt {
 public:
  struct Context {
    const GroupOptions& options;
    PeerMemory& memory;
    Switchboard& board;
    Store& store;
    const std::atomic<bool>& closing;
  };

  Attempt(const Context& context, const std::vector<int>& targets, Deadline deadline);

  // On success every target is attached and its link kept by the switchboard. On failure nothing of any target is left.
  // In both cases the card is out of the store.
  Result<std::vector<PeerIdentity>> run();

 private:
  struct Candidate {
    int rank = -1;
    std::optional<Link> link;
    bool named_us = false;     // its memory has arrived
    bool attached = false;     // its memory is mapped here
    bool attached_us = false;  // ours is mapped there
    bool ready = false;        // it is prepared with all of its own targets
    bool gave_up = false;      // it was there and ended its own attempt
    bool gone = false;         // it died after it may have been ready
    std::string seen = "no card of it in the store";
    Nanoseconds look_at = 0;   // when to look for its card next
    Nanoseconds pause_ns = 0;  // before the look after that
    Nanoseconds foreign_since = 0;
    bool prepared() const { return attached && attached_us; }
  };

  Result<void> negotiate();
  Result<void> take_callers();
  Result<void> hear_all();
  Result<bool> hear(Candidate& candidate);
  Result<void> take(Candidate& candidate, net::Message message);
  Result<void> take_memory(Candidate& candidate, const Memory& memory, std::vector<Fd> descriptors);
  Result<void> lost(Candidate& candidate, const std::string& reason);
  Result<void> gave_up(Candidate& candidate, const std::string& reason);
  Result<void> name(Candidate& candidate);  // sends our memory
  Result<void> say(Candidate& candidate, const LinkMessage& message, std::span<const int> descriptors = {});
  Result<void> announce_ready();
  Result<void> wait_or_look();
  Result<void> look_for(Candidate& candidate);
  Result<void> call(Candidate& candidate, const Card& card);
  Result<void> meet_foreigner(Candidate& candidate, const Card& card);
  Result<void> refuse_foreigner(const Candidate& candidate);
  void forget(Candidate& candidate);
  void undo(const Error& error);
  bool complete() const;
  Error timeout_error() const;
  std::string describe(const Candidate& candidate) const;

  const Context context_;
  const Deadline deadline_;
  std::vector<Candidate> candidates_;
  Card card_;
  Export export_;
  bool ready_sent_ = false;
};

}  // namespace nixl::core::ep
