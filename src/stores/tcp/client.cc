#include "stores/tcp/tcp.h"

namespace nixl::core {
namespace {
constexpr Nanoseconds kAnswerGrace_ns = 500'000'000;  // for the answer to a wait that ended at its deadline
}

Result<std::unique_ptr<Store>> TcpStore::open(StoreConfig config) {
  NIXL_ASSIGN(net::Endpoint endpoint, net::parse_endpoint(config.endpoint));
  std::unique_ptr<TcpStore> store(new TcpStore(std::move(config), std::move(endpoint)));
  NIXL_ASSIGN(net::Channel first, store->dial(Deadline::after(store->config_.connect_timeout_ns)));
  store->idle_.push_back(std::make_unique<net::Channel>(std::move(first)));
  return store;
}

Result<void> TcpStore::publish(std::string_view key, std::string_view value) {
  if (key.size() > tcp_store::kMaxKeyBytes || value.size() > tcp_store::kMaxValueBytes)
    return fail(Code::kInvalidArgument, "key of %zu bytes with %zu bytes of value; at most %zu and %zu are possible",
                key.size(), value.size(), tcp_store::kMaxKeyBytes, tcp_store::kMaxValueBytes);
  NIXL_TRY(ask({tcp_store::Verb::kPublish, std::string(key), std::string(value)}, Deadline::after(config_.timeout_ns)));
  return {};
}

Result<std::string> TcpStore::fetch(std::string_view key, Deadline deadline) {
  const Nanoseconds left = deadline.left();
  // Asking once still takes the time of an answer.
  const Deadline limit = left == 0 ? Deadline::after(config_.timeout_ns) : deadline;
  const Deadline answer_by =
      limit.at() == Deadline::never().at() ? limit : Deadline::after(limit.left() + kAnswerGrace_ns);
  NIXL_ASSIGN(tcp_store::Answer answer, ask({tcp_store::Verb::kFetch, std::string(key), "", left}, answer_by));
  if (!answer.found)
    return fail(Code::kTimeout, "key '%.*s' is not in the store at %s", int(key.size()), key.data(),
                to_text(endpoint_).c_str());
  return std::move(answer.value);
}

Result<void> TcpStore::withdraw(std::string_view key) {
  NIXL_TRY(ask({tcp_store::Verb::kWithdraw, std::string(key), ""}, Deadline::after(config_.timeout_ns)));
  return {};
}

Result<tcp_store::Answer> TcpStore::ask(const tcp_store::Request& request, Deadline deadline) {
  const std::string bytes = tcp_store::encode(request);
  // An idle connection may have died with an earlier server; every request can be repeated.
  while (std::unique_ptr<net::Channel> idle = take_idle()) {
    auto answer = converse(*idle, bytes, deadline);
    if (!answer && answer.error().code == Code::kPeerLost) continue;
    if (!answer) return answer;
    const std::lock_guard lock(mutex_);
    idle_.push_back(std::move(idle));
    return answer;
  }
  NIXL_ASSIGN(net::Channel channel, dial(Deadline::after(config_.connect_timeout_ns).earlier(deadline)));
  auto answer = converse(channel, bytes, deadline);
  if (!answer) {
    const Code code = answer.error().code == Code::kPeerLost ? Code::kIo : answer.error().code;
    return fail(Error{code, "store at " + to_text(endpoint_) + ": " + answer.error().reason});
  }
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::make_unique<net::Channel>(std::move(channel)));
  return answer;
}

Result<tcp_store::Answer> TcpStore::converse(net::Channel& channel, const std::string& request, Deadline deadline) {
  NIXL_TRY(channel.send(request, deadline));
  NIXL_ASSIGN(const net::Message message, channel.receive(deadline));
  return tcp_store::parse_answer(message.bytes);
}

Result<net::Channel> TcpStore::dial(Deadline deadline) {
  auto socket = net::connect_tcp(endpoint_, deadline);
  if (!socket) {
    Error error = std::move(socket).error();
    error.code = Code::kIo;
    return fail(within("store", std::move(error)));
  }
  return net::Channel(std::move(*socket), tcp_store::kMaxFrameBytes);
}

std::unique_ptr<net::Channel> TcpStore::take_idle() {
  const std::lock_guard lock(mutex_);
  if (idle_.empty()) return nullptr;
  std::unique_ptr<net::Channel> channel = std::move(idle_.back());
  idle_.pop_back();
  return channel;
}

const StoreEntry& store_tcp() {
  static const StoreEntry entry{"tcp", TcpStore::open};
  return entry;
}

}  // namespace nixl::core
