#include "ep/group/switchboard.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <utility>

#include "base/log.h"
#include "ep/group/messages.h"
#include "net/local.h"

namespace nixl::core::ep {
namespace {

constexpr Nanoseconds kHelloLimit_ns = 10'000'000'000;
constexpr std::size_t kMaxStrangers = 1024;

// A link on which nothing is expected: false when it has ended or says anything at all (an abort after the connect).
bool silent(Link& link) {
  auto message = link.channel.try_receive();
  return message && !*message;
}

}  // namespace

Result<std::unique_ptr<Switchboard>> Switchboard::open(int rank, std::uint32_t incarnation) {
  NIXL_ASSIGN(net::Wakeup stop, net::Wakeup::open());
  NIXL_ASSIGN(net::Wakeup calls, net::Wakeup::open());
  std::unique_ptr<Switchboard> board(new Switchboard(rank, incarnation, std::move(stop), std::move(calls)));
  char name[net::kMaxLocalName];
  std::snprintf(name, sizeof(name), "nixl_ep.%d.%08x.%d", rank, incarnation, static_cast<int>(::getpid()));
  board->socket_name_ = name;
  NIXL_ASSIGN(board->listener_, net::listen_local(name));
  board->listener_closed_in_children_ = ClosedInChildren(board->listener_.get());
  // Signals of the application are not for this thread.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  board->thread_ = std::thread(&Switchboard::serve, board.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return board;
}

Switchboard::Switchboard(int rank, std::uint32_t incarnation, net::Wakeup stop, net::Wakeup calls)
    : rank_(rank), incarnation_(incarnation), stop_(std::move(stop)), calls_(std::move(calls)) {}

Switchboard::~Switchboard() {
  stopping_ = true;
  stop_.wake();
  if (thread_.joinable()) thread_.join();
}

std::optional<std::uint32_t> Switchboard::caller(int rank) const {
  const std::lock_guard lock(mutex_);
  const auto found = callers_.find(rank);
  if (found == callers_.end()) return std::nullopt;
  return found->second.incarnation;
}

std::optional<Link> Switchboard::take_caller(int rank) {
  const std::lock_guard lock(mutex_);
  const auto found = callers_.find(rank);
  if (found == callers_.end()) return std::nullopt;
  std::optional<Link> link;
  if (silent(found->second)) link.emplace(std::move(found->second));
  callers_.erase(found);
  return link;
}

void Switchboard::keep(Link link) {
  const std::lock_guard lock(mutex_);
  members_.insert_or_assign(link.rank, std::move(link));
}

void Switchboard::drop(int rank) {
  const std::lock_guard lock(mutex_);
  members_.erase(rank);
}

bool Switchboard::alive(int rank) {
  const std::lock_guard lock(mutex_);
  const auto found = members_.find(rank);
  if (found == members_.end()) return false;
  if (silent(found->second)) return true;
  members_.erase(found);
  return false;
}

std::vector<pollfd> Switchboard::poll_list() const {
  std::vector<pollfd> list{{listener_.get(), POLLIN, 0}, {stop_.fd(), POLLIN, 0}};
  const std::lock_guard lock(mutex_);
  for (const Stranger& stranger : strangers_) list.push_back({stranger.channel.fd(), POLLIN, 0});
  for (const auto& [rank, link] : callers_) list.push_back({link.channel.fd(), POLLIN, 0});
  return list;
}

// Members are not polled: whoever asks about one looks at its link then.
void Switchboard::serve() {
  while (!stopping_) {
    std::vector<pollfd> list = poll_list();
    Deadline deadline = Deadline::never();
    for (const Stranger& stranger : strangers_) deadline = deadline.earlier(stranger.deadline);
    if (auto ready = net::wait_any(list, deadline); !ready) {
      NIXL_ERROR("nixl_ep rank %d: the thread that listens for peers ends: %s", rank_, ready.error().reason.c_str());
      return;
    }
    stop_.clear();
    accept_strangers();
    hear_strangers();
    hear_callers();
  }
}

void Switchboard::accept_strangers() {
  for (;;) {
    auto socket = net::accept_connection(listener_.get());
    if (!socket) {
      if (socket.error().code == Code::kAgain) return;
      // Out of descriptors: the callers stay in the queue of the socket; look again a little later.
      NIXL_WARN("nixl_ep rank %d cannot take a call: %s", rank_, socket.error().reason.c_str());
      (void)net::wait_any({}, Deadline::after(10'000'000));
      return;
    }
    auto who = net::peer_credentials(socket->get());
    if (!who || who->uid != ::geteuid()) {
      NIXL_WARN("nixl_ep rank %d refused a call of process %d: it is of user %u, this one of user %u", rank_,
                who ? who->pid : 0, who ? who->uid : 0, ::geteuid());
      continue;
    }
    const std::lock_guard lock(mutex_);
    if (strangers_.size() >= kMaxStrangers) continue;
    strangers_.push_back(
        {Deadline::after(kHelloLimit_ns), who->pid, net::Channel(std::move(*socket), kMaxMessageBytes)});
  }
}

void Switchboard::hear_strangers() {
  const std::lock_guard lock(mutex_);
  std::erase_if(strangers_, [this](Stranger& stranger) {
    auto message = stranger.channel.try_receive();
    if (message && !*message) return stranger.deadline.passed();
    if (message) welcome(stranger, (*message)->bytes);
    return true;
  });
}

void Switchboard::welcome(Stranger& stranger, const std::string& bytes) {
  auto message = parse_message(bytes);
  const Hello* hello = message ? std::get_if<Hello>(&*message) : nullptr;
  if (!hello || hello->called_rank != rank_ || hello->called_incarnation != incarnation_ || hello->rank == rank_) {
    NIXL_WARN("nixl_ep rank %d refused a call of process %d: %s", rank_, stranger.pid,
              message ? "it is for another rank or incarnation" : message.error().reason.c_str());
    return;
  }
  callers_.insert_or_assign(hello->rank,
                            Link{hello->rank, hello->incarnation, stranger.pid, std::move(stranger.channel)});
  calls_.wake();
}

void Switchboard::hear_callers() {
  const std::lock_guard lock(mutex_);
  for (auto entry = callers_.begin(); entry != callers_.end();)
    entry = silent(entry->second) ? std::next(entry) : callers_.erase(entry);
}

}  // namespace nixl::core::ep
