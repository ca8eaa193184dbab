#include "ep/group/attempt.h"

#include <unistd.h>

#include <algorithm>

#include "base/log.h"

namespace nixl::core::ep {
namespace {

constexpr Nanoseconds kMs = 1'000'000;
constexpr Nanoseconds kFirstPause_ns = 2 * kMs, kLastPause_ns = 100 * kMs;  // between looks into the store
// A lower rank calls us; its card is looked at only to learn that it cannot.
constexpr Nanoseconds kGlance_ns = 500 * kMs;
constexpr Nanoseconds kForeignGrace_ns = 2000 * kMs;
constexpr Nanoseconds kDialLimit_ns = 1000 * kMs;
constexpr Nanoseconds kSayLimit_ns = 5000 * kMs;

std::string host_name() {
  char text[256] = "";
  ::gethostname(text, sizeof(text) - 1);
  return text;
}

std::string list_text(const std::vector<int>& ranks) {
  std::string text;
  for (int rank : ranks) text += (text.empty() ? "" : ", ") + std::to_string(rank);
  return "[" + text + "]";
}

}  // namespace

Attempt::Attempt(const Context& context, const std::vector<int>& targets, Deadline deadline)
    : context_(context), deadline_(deadline) {
  for (int rank : targets) {
    Candidate& candidate = candidates_.emplace_back();
    candidate.rank = rank;
    candidate.pause_ns = kFirstPause_ns;
    if (rank < context.options.rank) {
      candidate.look_at = now_ns() + kGlance_ns;
      candidate.seen = "it has not called";
    }
  }
}

Result<std::vector<PeerIdentity>> Attempt::run() {
  NIXL_ASSIGN(card_.place, net::this_place());
  NIXL_ASSIGN(export_, context_.memory.export_memory());
  card_.rank = context_.options.rank;
  card_.incarnation = context_.options.incarnation;
  card_.pid = ::getpid();
  card_.host = host_name();
  card_.socket = context_.board.socket_name();
  const std::string key = store_key(card_.rank);
  Result<void> done = context_.store.publish(key, encode(card_));
  if (done) done = negotiate();
  if (!done) undo(done.error());
  // The pairs stand or fall without the store: that it does not answer now changes nothing.
  if (auto removed = context_.store.withdraw(key); !removed && done)
    NIXL_WARN("nixl_ep rank %d: key %s was not removed: %s", card_.rank, key.c_str(), removed.error().reason.c_str());
  if (!done) return fail(std::move(done).error());
  std::vector<PeerIdentity> peers;
  for (Candidate& candidate : candidates_) {
    peers.push_back({candidate.rank, candidate.link->incarnation});
    context_.board.keep(std::move(*candidate.link));
  }
  return peers;
}

Result<void> Attempt::negotiate() {
  for (;;) {
    context_.board.calls().clear();
    if (context_.closing) return fail(Code::kCancelled, "connect was cancelled: the buffer is being destroyed");
    NIXL_TRY(hear_all());
    NIXL_TRY(take_callers());
    NIXL_TRY(announce_ready());
    if (complete()) return {};
    if (deadline_.passed()) return fail(timeout_error());
    NIXL_TRY(wait_or_look());
  }
}

Result<void> Attempt::take_callers() {
  for (Candidate& candidate : candidates_) {
    if (candidate.rank > card_.rank) continue;
    const auto waiting = context_.board.caller(candidate.rank);
    if (!waiting) continue;
    // A second call of the same rank: the first one ended, whether or not that has been noticed.
    if (candidate.link) NIXL_TRY(lost(candidate, "it has called again"));
    if (candidate.gone) continue;
    candidate.link = context_.board.take_caller(candidate.rank);
    if (candidate.link) NIXL_TRY(name(candidate));
  }
  return {};
}

Result<void> Attempt::hear_all() {
  for (Candidate& candidate : candidates_) {
    bool more = true;
    while (more && candidate.link && !candidate.gone) {
      NIXL_ASSIGN(more, hear(candidate));
    }
  }
  return {};
}

// One message, if one has arrived.
Result<bool> Attempt::hear(Candidate& candidate) {
  auto message = candidate.link->channel.try_receive();
  if (!message && message.error().code == Code::kPeerLost) {
    NIXL_TRY(lost(candidate, message.error().reason));
    return true;
  }
  if (!message) return fail(within(describe(candidate), std::move(message).error()));
  if (!*message) return false;
  NIXL_TRY(take(candidate, std::move(**message)));
  return true;
}

Result<void> Attempt::take(Candidate& candidate, net::Message message) {
  auto parsed = parse_message(message.bytes);
  if (!parsed) return fail(within(describe(candidate), std::move(parsed).error()));
  if (const auto* memory = std::get_if<Memory>(&*parsed); memory && !candidate.named_us)
    return take_memory(candidate, *memory, std::move(message.descriptors));
  if (std::holds_alternative<Attached>(*parsed)) {
    candidate.attached_us = true;
  } else if (std::holds_alternative<Ready>(*parsed)) {
    candidate.ready = true;
  } else if (const auto* abort = std::get_if<Abort>(&*parsed)) {
    return gave_up(candidate, abort->reason);
  } else {
    return fail(Code::kMismatch, "%s: unexpected message %zu of the handshake", describe(candidate).c_str(),
                parsed->index());
  }
  return {};
}

Result<void> Attempt::take_memory(Candidate& candidate, const Memory& memory, std::vector<Fd> descriptors) {
  candidate.named_us = true;
  if (memory.experts_per_rank != context_.options.experts_per_rank)
    return fail(Code::kInvalidArgument,
                "%s has %d experts per rank, this rank %d: pass the same number to "
                "update_memory_buffers on all ranks",
                describe(candidate).c_str(), memory.experts_per_rank, context_.options.experts_per_rank);
  if (candidate.rank > card_.rank) NIXL_TRY(name(candidate));  // the higher rank has sent its memory first
  if (!candidate.link) return {};
  auto mapped = context_.memory.attach({candidate.rank, candidate.link->incarnation},
                                       {memory.description, std::move(descriptors)});
  if (!mapped) return fail(within("memory of " + describe(candidate), std::move(mapped).error()));
  candidate.attached = true;
  candidate.seen = "it has not finished its side";
  return say(candidate, Attached{});
}

// The link has ended without an abort.
Result<void> Attempt::lost(Candidate& candidate, const std::string& reason) {
  if (ready_sent_) {
    candidate.gone = true;
    return {};
  }
  const std::string text = describe(candidate) + " died while connecting (" + reason + ")";
  const bool was_connecting = candidate.named_us;
  forget(candidate);
  candidate.seen = text;
  if (was_connecting) return fail(Code::kPeerLost, "%s", text.c_str());
  return {};
}

// The other side ended its own attempt; it may try again.
Result<void> Attempt::gave_up(Candidate& candidate, const std::string& reason) {
  const std::string text = describe(candidate) + " gave up: " + reason;
  if (ready_sent_) return fail(Code::kPeerLost, "%s", text.c_str());
  forget(candidate);
  candidate.seen = text;
  candidate.gave_up = true;
  return {};
}

void Attempt::forget(Candidate& candidate) {
  if (candidate.attached) (void)context_.memory.detach(candidate.rank);
  const int rank = candidate.rank;
  candidate = Candidate{};
  candidate.rank = rank;
  candidate.pause_ns = kFirstPause_ns;
  candidate.look_at = now_ns() + (rank < card_.rank ? kGlance_ns : kFirstPause_ns);
}

Result<void> Attempt::name(Candidate& candidate) {
  candidate.seen = "it has not answered";
  std::vector<int> descriptors;
  for (const Fd& fd : export_.descriptors) descriptors.push_back(fd.get());
  return say(candidate, Memory{context_.options.experts_per_rank, export_.description}, descriptors);
}

Result<void> Attempt::say(Candidate& candidate, const LinkMessage& message, std::span<const int> descriptors) {
  auto sent =
      candidate.link->channel.send(encode(message), descriptors, Deadline::after(kSayLimit_ns).earlier(deadline_));
  if (sent) return {};
  // What it said before it ended is still to be heard, and tells why.
  if (sent.error().code == Code::kPeerLost) return {};
  return fail(within("message to " + describe(candidate), std::move(sent).error()));
}

Result<void> Attempt::announce_ready() {
  if (ready_sent_ || !std::ranges::all_of(candidates_, &Candidate::prepared)) return {};
  ready_sent_ = true;
  for (Candidate& candidate : candidates_) NIXL_TRY(say(candidate, Ready{}));
  return {};
}

bool Attempt::complete() const {
  return ready_sent_ && std::ranges::all_of(candidates_, [](const Candidate& c) { return c.ready || c.gone; });
}

// Sleeps until a link speaks, somebody calls, or it is time to look for a card. The store is never waited in: links
// come first, and others may be using its connection.
Result<void> Attempt::wait_or_look() {
  Deadline until = deadline_;
  const Nanoseconds now = now_ns();
  for (Candidate& candidate : candidates_) {
    if (candidate.link) continue;
    if (candidate.look_at <= now) NIXL_TRY(look_for(candidate));
    until = until.earlier(Deadline::after(std::max<Nanoseconds>(candidate.look_at - now, 0)));
  }
  std::vector<pollfd> list{{context_.board.calls().fd(), POLLIN, 0}};
  for (const Candidate& candidate : candidates_)
    if (candidate.link && !candidate.gone) list.push_back({candidate.link->channel.fd(), POLLIN, 0});
  NIXL_TRY(net::wait_any(list, until));
  return {};
}

Result<void> Attempt::look_for(Candidate& candidate) {
  const bool calls_us = candidate.rank < card_.rank;
  candidate.look_at = now_ns() + (calls_us ? kGlance_ns : candidate.pause_ns);
  candidate.pause_ns = std::min(2 * candidate.pause_ns, kLastPause_ns);
  auto bytes = context_.store.fetch(store_key(candidate.rank), Deadline::passed_already());
  if (!bytes && bytes.error().code == Code::kTimeout) {
    // A card that is taken back was a living rank's: it has seen ours and will not come.
    if (candidate.foreign_since != 0) return refuse_foreigner(candidate);
    return {};
  }
  if (!bytes)
    return fail(
        within("Failed to get metadata for remote agent " + std::to_string(candidate.rank), std::move(bytes).error()));
  auto card = parse_card(*bytes);
  if (card && card->rank != candidate.rank) card = fail(Code::kMismatch, "the card is that of rank %d", card->rank);
  if (!card) {
    candidate.seen = store_key(candidate.rank) + " cannot be read: " + card.error().reason;
    return {};
  }
  if (card->place.boot_id != card_.place.boot_id || card->place.network_namespace != card_.place.network_namespace)
    return meet_foreigner(candidate, *card);
  candidate.foreign_since = 0;
  if (!calls_us) return call(candidate, *card);
  candidate.seen = "process " + std::to_string(card->pid) + " has not called";
  return {};
}

Result<void> Attempt::call(Candidate& candidate, const Card& card) {
  const std::string who = "rank " + std::to_string(card.rank) + " (process " + std::to_string(card.pid) + ")";
  auto socket = net::connect_local(card.socket, Deadline::after(kDialLimit_ns).earlier(deadline_));
  if (!socket && (socket.error().code == Code::kPeerLost || socket.error().code == Code::kTimeout)) {
    candidate.seen = "its card is out of date: " + who + " does not listen any more (" + socket.error().reason + ")";
    return {};
  }
  if (!socket) return fail(within(who, std::move(socket).error()));
  NIXL_ASSIGN(const net::Credentials peer, net::peer_credentials(socket->get()));
  if (peer.uid != ::geteuid())
    return fail(Code::kNotAllowed, "%s runs as user %u, this rank as user %u: run all ranks as one user", who.c_str(),
                peer.uid, ::geteuid());
  candidate.link = Link{card.rank, card.incarnation, card.pid, net::Channel(std::move(*socket), kMaxMessageBytes)};
  candidate.seen = "it has not named this rank";
  return say(candidate, Hello{card_.rank, card_.incarnation, card.rank, card.incarnation});
}

Result<void> Attempt::meet_foreigner(Candidate& candidate, const Card& card) {
  const bool other_host = card.place.boot_id != card_.place.boot_id;
  candidate.seen = "process " + std::to_string(card.pid) + " on host " + card.host + " is in another " +
                   (other_host ? "host" : "network namespace") + " than this rank (" + card_.host + ")";
  const Nanoseconds now = now_ns();
  if (candidate.foreign_since == 0) candidate.foreign_since = now;
  if (now - candidate.foreign_since < kForeignGrace_ns) return {};
  return refuse_foreigner(candidate);
}

Result<void> Attempt::refuse_foreigner(const Candidate& candidate) {
  return fail(
      Code::kUnsupported,
      "rank %d cannot be connected: %s. Memory is shared by passing file descriptors, which works between processes "
      "of one host and one network namespace only",
      candidate.rank, candidate.seen.c_str());
}

void Attempt::undo(const Error& error) {
  for (Candidate& candidate : candidates_) {
    if (candidate.link) (void)candidate.link->channel.send(encode(Abort{error.reason}), Deadline::passed_already());
    forget(candidate);
  }
}

std::string Attempt::describe(const Candidate& candidate) const {
  std::string text = "rank " + std::to_string(candidate.rank);
  if (candidate.link) text += " (process " + std::to_string(candidate.link->pid) + ")";
  return text;
}

Error Attempt::timeout_error() const {
  const auto is_missing = [this](const Candidate& candidate) {
    return ready_sent_ ? !candidate.ready && !candidate.gone : !candidate.prepared();
  };
  // Who gave up because of a third one is not the cause.
  const bool only_quitters =
      std::ranges::none_of(candidates_, [&](const Candidate& c) { return is_missing(c) && !c.gave_up; });
  std::vector<int> missing;
  std::string details;
  for (const Candidate& candidate : candidates_) {
    if (!is_missing(candidate) || (candidate.gave_up && !only_quitters)) continue;
    missing.push_back(candidate.rank);
    details +=
        "; " + describe(candidate) + ": " + (ready_sent_ ? "it waits for ranks of its own list" : candidate.seen);
  }
  return {Code::kTimeout, "ranks " + list_text(missing) + " are missing after " +
                              std::to_string(context_.options.connect_timeout_ns / kMs) +
                              " ms (NIXL_EP_CONNECT_TIMEOUT_MS)" + details};
}

}  // namespace nixl::core::ep
