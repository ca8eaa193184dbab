#include "ep/cpu/exchange.h"

#include <algorithm>

#include "base/log.h"

namespace nixl::core::ep {

namespace {

// How long a waiter looks before it sleeps. With more ranks than cores, looking takes the core from whom it waits for.
constexpr Nanoseconds kSpinAloneNs = 50'000;
constexpr Nanoseconds kSpinCrowdedNs = 2'000;

// How long a slot is kept for a peer that was masked or detached after the operation, in case it still reads.
constexpr Nanoseconds kKeptNs = 1'000'000'000;

// Whether a rank can have written this: no sum of its numbers overflows, and rows do not overlap.
bool plausible(const Message& m) {
  const auto within = [](std::int64_t value, std::int64_t most) { return value >= 0 && value <= most; };
  constexpr std::int64_t kMostEntries = std::int64_t{1} << 40, kMostStride = 4 * kMaxHidden;
  return within(m.stage_offset, std::int64_t{1} << 56) && within(m.num_entries, kMostEntries) &&
         within(m.num_tokens, m.max_tokens) && within(m.max_tokens, kMaxTokens) && within(m.hidden, kMaxHidden) &&
         within(m.row_stride, kMostStride) && (m.row_stride == 0 || m.row_stride >= 2 * m.hidden) &&
         within(m.num_ranks, kMaxRanks) && within(m.experts_per_rank, INT32_MAX / kMaxRanks);
}

}  // namespace

const char* name(WaitSite site) noexcept {
  switch (site) {
    case WaitSite::kDispatch:
      return "dispatch";
    case WaitSite::kCombineWeights:
      return "combine (weights)";
    case WaitSite::kCombineRows:
      return "combine";
    case WaitSite::kBarrier:
      return "barrier";
  }
  return "?";
}

Exchange::Exchange(Channel channel, int rank, std::uint32_t incarnation, Timing timing, OwnMemory& own,
                   PeerTable& peers, std::int32_t* fault_words)
    : channel_(channel),
      rank_(rank),
      incarnation_(incarnation),
      timing_(timing),
      own_(own),
      peers_(peers),
      fault_words_(fault_words),
      cores_(usable_cores()),
      reached_(kMaxRanks, 0) {}

void Exchange::begin(std::uint64_t operation, nixl::ep::Phase phase, int num_ranks) {
  operation_ = operation;
  phase_ = phase;
  peers_.begin_operation(channel_, num_ranks, participants_);
  take_slot();
}

void Exchange::begin_again() {
  std::size_t kept = 0;
  for (std::size_t i = 0; i < participants_.size(); ++i)
    if (waiting_[i].stand == Stand::kArrived) std::swap(participants_[kept++], participants_[i]);
  participants_.resize(kept);
  peers_.continue_operation(channel_, participants_);
  take_slot();
}

void Exchange::take_slot() {
  std::fill(reached_.begin(), reached_.end(), 0);
  for (const Participant& participant : participants_) reached_[static_cast<std::size_t>(participant.peer->rank)] = 1;
  waiting_.assign(participants_.size(), Waiting{});
  slot_ = next_slot();
  next_slot_ = -1;
}

bool Exchange::still_read(int slot, Nanoseconds now) const {
  const Staging& staging = stagings_[slot];
  const bool kept = now - staging.at < kKeptNs;
  for (const Staging::Reader& reader : staging.readers) {
    const Peer& peer = *reader.peer;
    if (peer.failed.load(std::memory_order_acquire)) continue;
    const bool left = peer.masked.load(std::memory_order_acquire) || peer.gone.load(std::memory_order_acquire);
    if (left && !kept) continue;
    const FlagWord taken = own_.control().inbox(peer.rank).taken.load(std::memory_order_acquire);
    if (flag_incarnation(taken) != flag_incarnation(reader.taken) || later(flag_count(reader.taken), flag_count(taken)))
      return true;
  }
  return false;
}

// The first slot that nobody reads; a rank in step always finds one of the first two. If none is left, the oldest: who
// reads it will notice.
int Exchange::next_slot() {
  if (next_slot_ >= 0) return next_slot_;
  const Nanoseconds now = now_ns();
  next_slot_ = 0;
  for (int slot = 0; slot < kSlots; ++slot) {
    if (!still_read(slot, now)) return next_slot_ = slot;
    if (stagings_[slot].at < stagings_[next_slot_].at) next_slot_ = slot;
  }
  return next_slot_;
}

Result<std::byte*> Exchange::stage(std::int64_t bytes, std::int64_t at) {
  if (at + bytes > own_.slot_bytes())
    return nixl::core::fail(Code::kInternal, "a stage of %lld bytes does not fit a slot of %lld",
                            static_cast<long long>(at + bytes), static_cast<long long>(own_.slot_bytes()));
  stage_at_ = at;
  own_.begin_stage(slot());
  return own_.slot(slot()) + at;
}

void Exchange::publish(Message message) {
  message.slot = static_cast<std::uint32_t>(slot_);
  message.stage_offset = own_.slot_offset(slot()) + stage_at_;
  message.generation = own_.end_stage(slot());
  own_message_ = message;
  Staging& staging = stagings_[slot_];
  staging.at = now_ns();
  staging.readers.clear();
  for (const Participant& participant : participants_)
    staging.readers.push_back({participant.peer, make_flag(participant.pair.incarnation, participant.pair.sent)});
  announce(message);
}

void Exchange::announce(const Message& message) {
  peers_.announce(channel_, participants_, message);
  for (const Participant& participant : participants_) {
    if (participant.dropped()) continue;
    const Control& control = participant.peer->memory.control();
    const std::uint32_t count = participant.pair.sent;
    control.inbox(rank_).flag(channel_, count).store(make_flag(incarnation_, count), std::memory_order_release);
    control.hello().doorbell.ring();
  }
}

bool Exchange::read_header(const Participant& participant, Waiting& waiting) const {
  const std::uint32_t count = participant.pair.expected;
  const Header& header = participant.peer->memory.control().header(rank_, channel_, count);
  if (header.count.load(std::memory_order_acquire) != count ||
      header.awaits.load(std::memory_order_relaxed) != participant.pair.sent)
    return false;
  waiting.message = header.message;
  return still_holds(participant, waiting);
}

bool Exchange::still_holds(const Participant& participant, const Waiting& waiting) const {
  reads_done();
  const Control& control = participant.peer->memory.control();
  const std::uint32_t count = participant.pair.expected;
  const Header& header = control.header(rank_, channel_, count);
  if (header.count.load(std::memory_order_acquire) != count || header.revoked.load(std::memory_order_acquire) != 0)
    return false;
  return channel_ == Channel::kBarriers ||
         (waiting.message.slot < kSlots && control.hello().generation[waiting.message.slot].load(
                                               std::memory_order_acquire) == waiting.message.generation);
}

void Exchange::look_for_message(std::size_t i) {
  const Participant& participant = participants_[i];
  Waiting& waiting = waiting_[i];
  const PairState& pair = participant.pair;
  Inbox& inbox = own_.control().inbox(participant.peer->rank);
  waiting.seen = inbox.flag(channel_, pair.expected).load(std::memory_order_acquire);
  waiting.expected = make_flag(pair.incarnation, pair.expected);
  switch (judge(pair, waiting.seen)) {
    case Verdict::kWait:
      return;
    case Verdict::kMismatch:
      return fail(i, "is not in step");
    case Verdict::kAccept:
      break;
  }
  if (!read_header(participant, waiting)) return fail(i, "has taken its message back: it masked this rank");
  if (!plausible(waiting.message)) return fail(i, "announces what cannot be");
  waiting.stand = Stand::kArrived;
  peers_.accept(channel_, participant);
}

bool Exchange::look_at_pending(std::int64_t* wait_cost, Nanoseconds start) {
  bool pending = false;
  for (std::size_t i = 0; i < waiting_.size(); ++i) {
    if (waiting_[i].stand != Stand::kPending) continue;
    if (participants_[i].dropped())
      waiting_[i].stand = Stand::kOut;
    else
      look_for_message(i);
    if (waiting_[i].stand == Stand::kPending)
      pending = true;
    else if (wait_cost)
      wait_cost[participants_[i].peer->rank] += now_ns() - start;
  }
  return pending;
}

bool Exchange::keeps_waiting(std::size_t i, Nanoseconds start, Nanoseconds now) {
  Waiting& waiting = waiting_[i];
  if (now < waiting.deadline) return true;
  if (timing_.timeout_ns == 0) return false;
  // A peer that waits for a third rank, or has just given one up, is late through no fault of its own.
  const Hello& hello = participants_[i].peer->memory.control().hello();
  const Nanoseconds held_until = hello.held_until.load(std::memory_order_acquire);
  const Nanoseconds released_at = hello.released_at.load(std::memory_order_acquire);
  const Nanoseconds excuse = std::max(held_until, released_at);
  if (excuse > start && excuse != waiting.excuse) {  // one extension for each
    waiting.excuse = excuse;
    const Nanoseconds longer = held_until > released_at
                                   ? std::max(held_until, now) + Timing::kGraceNs  // it may not have had a core yet
                                   : released_at + timing_.timeout_ns;
    waiting.deadline = std::max(waiting.deadline, std::min(longer, start + 2 * timing_.timeout_ns));
  }
  return now < waiting.deadline;
}

Nanoseconds Exchange::next_deadline(std::int64_t* wait_cost, Nanoseconds start, Nanoseconds now) {
  Nanoseconds first = INT64_MAX;
  Nanoseconds last = 0;
  bool failed = false;
  for (std::size_t i = 0; i < waiting_.size(); ++i) {
    if (waiting_[i].stand != Stand::kPending) continue;
    if (keeps_waiting(i, start, now)) {
      first = std::min(first, waiting_[i].deadline);
      last = std::max(last, waiting_[i].deadline);
      continue;
    }
    fail(i, "did not come in time");
    if (wait_cost) wait_cost[participants_[i].peer->rank] += now - start;
    failed = true;
  }
  Hello& hello = own_.control().hello();
  if (failed) hello.released_at.store(now, std::memory_order_release);
  hello.held_until.store(last, std::memory_order_release);
  return failed ? 0 : first;
}

void Exchange::wait_all(WaitSite site, std::int64_t* wait_cost) {
  site_ = site;
  Hello& hello = own_.control().hello();
  const Nanoseconds start = now_ns();
  const bool crowded = static_cast<int>(participants_.size()) >= cores_;
  const Nanoseconds spin_until = start + std::min(timing_.timeout_ns, crowded ? kSpinCrowdedNs : kSpinAloneNs);
  const Nanoseconds deadline = Deadline::after(timing_.timeout_ns).at();
  for (Waiting& waiting : waiting_) waiting.deadline = deadline;
  while (true) {
    const std::uint32_t rings = hello.doorbell.rings_heard();
    if (!look_at_pending(wait_cost, start)) break;
    const Nanoseconds now = now_ns();
    if (now < spin_until) continue;
    const Nanoseconds next = next_deadline(wait_cost, start, now);
    if (next > 0) hello.doorbell.sleep(rings, Deadline::after(next - now));
  }
  hello.held_until.store(0, std::memory_order_release);
}

void Exchange::fail(std::size_t i, const char* why) {
  Waiting& waiting = waiting_[i];
  waiting.stand = Stand::kOut;
  Fault fault;
  fault.rank = participants_[i].peer->rank;
  fault.operation = operation_;
  fault.phase = phase_;
  fault.expected = waiting.expected;
  fault.seen = waiting.seen;
  if (!peers_.fail_peer(participants_[i], fault)) return;
  fault_words_[fault.rank] = 1;
  NIXL_WARN(
      "NIXL-EP timeout: rank %d masks rank %d, which %s in %s, operation %llu (flag expected %016llx, seen %016llx)",
      rank_, fault.rank, why, name(site_), static_cast<unsigned long long>(operation_),
      static_cast<unsigned long long>(fault.expected), static_cast<unsigned long long>(fault.seen));
}

void Exchange::gather(WaitSite site, std::int64_t* wait_cost) {
  wait_all(site, wait_cost);
  list_sources();
}

void Exchange::list_sources() {
  sources_.clear();
  bool self_listed = false;
  const auto list_self = [&] {
    sources_.push_back({rank_, own_message_, nullptr});
    self_listed = true;
  };
  for (std::size_t i = 0; i < waiting_.size(); ++i) {
    const int rank = participants_[i].peer->rank;
    if (!self_listed && rank > rank_) list_self();
    if (waiting_[i].stand == Stand::kArrived) sources_.push_back({rank, waiting_[i].message, &participants_[i]});
  }
  if (!self_listed) list_self();
}

const std::byte* Exchange::stage_of(const Source& source, std::int64_t bytes) const {
  if (!source.participant) return own_.slot(slot()) + stage_at_;
  return source.participant->peer->memory.staged(source.message.stage_offset, bytes);
}

const std::byte* Exchange::memory_of(const Source& source, std::int64_t offset, std::int64_t bytes) const {
  if (!source.participant) return own_.slot(slot()) + (offset - own_.slot_offset(slot()));
  return source.participant->peer->memory.staged(offset, bytes);
}

void Exchange::reject(const Source& source) {
  if (source.participant)
    fail(static_cast<std::size_t>(source.participant - participants_.data()),
         "sent what does not fit or is being overwritten");
  list_sources();
}

bool Exchange::verify() {
  bool all = true;
  for (std::size_t i = 0; i < waiting_.size(); ++i) {
    if (waiting_[i].stand != Stand::kArrived || still_holds(participants_[i], waiting_[i])) continue;
    fail(i, "masked this rank and overwrote its message");
    waiting_[i].stand = Stand::kOut;
    all = false;
  }
  if (!all) {
    list_sources();
    return false;
  }
  for (std::size_t i = 0; i < waiting_.size(); ++i) {
    if (waiting_[i].stand != Stand::kArrived) continue;
    const Participant& participant = participants_[i];
    participant.peer->memory.control().inbox(rank_).taken.store(make_flag(incarnation_, participant.pair.expected),
                                                                std::memory_order_release);
  }
  return true;
}

void Exchange::barrier(std::uint64_t operation) {
  begin(operation, nixl::ep::Phase::kBarrier, kMaxRanks);
  announce(Message{});
  wait_all(WaitSite::kBarrier, nullptr);
}

}  // namespace nixl::core::ep
