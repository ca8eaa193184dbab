#include <unistd.h>

#include <algorithm>

#include "base/bytes.h"
#include "net/stream.h"
#include "stores/tcp/tcp.h"

namespace nixl::core {
namespace {
constexpr Nanoseconds kFirstPause_ns = 1'000'000, kLastPause_ns = 20'000'000;  // between looks for a missing key
}

using tcp_store::Verb;

Result<std::unique_ptr<Store>> TcpStore::open(StoreConfig config) {
  NIXL_ASSIGN(net::Endpoint endpoint, net::parse_endpoint(config.endpoint));
  std::unique_ptr<TcpStore> store(new TcpStore(std::move(config), std::move(endpoint)));
  NIXL_ASSIGN(Connection first, store->dial(Deadline::after(store->config_.connect_timeout_ns)));
  store->idle_.push_back(std::make_unique<Connection>(std::move(first)));
  return store;
}

Result<void> TcpStore::publish(std::string_view key, std::string_view value) {
  if (key.size() > tcp_store::kMaxKeyBytes || value.size() > tcp_store::kMaxValueBytes)
    return fail(Code::kInvalidArgument, "key of %zu bytes with %zu bytes of value; at most %zu and %zu are possible",
                key.size(), value.size(), tcp_store::kMaxKeyBytes, tcp_store::kMaxValueBytes);
  // SET has no answer; that of the PING behind it says that the server has it.
  const tcp_store::Request set{Verb::kSet, {std::string(key)}, std::string(value)};
  NIXL_TRY(ask(set, Form::kNone));
  return {};
}

Result<std::string> TcpStore::fetch(std::string_view key, Deadline deadline) {
  Nanoseconds pause = kFirstPause_ns;
  for (;;) {
    NIXL_ASSIGN(const std::string missing, ask({Verb::kCheck, {std::string(key)}}, Form::kByte));
    if (missing[0] == 0) return ask({Verb::kGet, {std::string(key)}}, Form::kText);
    if (deadline.passed())
      return fail(Code::kTimeout, "key '%.*s' is not in the store at %s", int(key.size()), key.data(),
                  to_text(endpoint_).c_str());
    NIXL_TRY(net::wait_any({}, Deadline::after(pause).earlier(deadline)));
    pause = std::min(2 * pause, kLastPause_ns);
  }
}

Result<void> TcpStore::withdraw(std::string_view key) {
  NIXL_TRY(ask({Verb::kDeleteKey, {std::string(key)}}, Form::kLong));
  return {};
}

// Bounded by the time of one operation. An idle connection may have died with an earlier server; every request can be
// repeated.
Result<std::string> TcpStore::ask(const tcp_store::Request& request, Form form) {
  const Deadline deadline = Deadline::after(config_.timeout_ns);
  const std::string bytes = encode(request);
  std::unique_ptr<Connection> connection = take_idle();
  Result<std::string> answer = fail(Code::kPeerLost, "no connection yet");
  while (connection) {
    answer = converse(*connection, bytes, form, deadline);
    if (answer || answer.error().code != Code::kPeerLost) break;
    connection = take_idle();
  }
  if (!connection) {
    NIXL_ASSIGN(Connection fresh, dial(Deadline::after(config_.connect_timeout_ns).earlier(deadline)));
    connection = std::make_unique<Connection>(std::move(fresh));
    answer = converse(*connection, bytes, form, deadline);
  }
  if (!answer) {
    const Code code = answer.error().code == Code::kPeerLost ? Code::kIo : answer.error().code;
    return fail(Error{code, "store at " + to_text(endpoint_) + ": " + answer.error().reason});
  }
  const std::lock_guard lock(mutex_);
  idle_.push_back(std::move(connection));
  return answer;
}

Result<std::string> TcpStore::converse(Connection& connection, const std::string& bytes, Form form, Deadline deadline) {
  const int fd = connection.socket.get();
  std::string& input = connection.input;
  input.clear();
  NIXL_TRY(net::send_all(fd, bytes, deadline));
  std::size_t head = 0, size = 1;
  if (form == Form::kNone) {
    NIXL_TRY(
        net::send_all(fd, tcp_store::encode({Verb::kPing, {}, "", static_cast<std::uint32_t>(::getpid())}), deadline));
    size = sizeof(std::uint32_t);
  } else if (form == Form::kLong) {
    size = sizeof(std::int64_t);
  } else if (form == Form::kText) {
    head = sizeof(std::uint64_t);
    NIXL_TRY(net::receive_until(fd, input, head, deadline));
    size = *ByteReader(input).get<std::uint64_t>();
    if (size > tcp_store::kMaxValueBytes)
      return fail(Code::kMismatch, "a value of %zu bytes; at most %zu are accepted", size, tcp_store::kMaxValueBytes);
  }
  NIXL_TRY(net::receive_until(fd, input, head + size, deadline));
  return input.substr(head, size);
}

Result<TcpStore::Connection> TcpStore::dial(Deadline deadline) {
  auto socket = net::connect_tcp(endpoint_, deadline);
  if (!socket) return fail(Error{Code::kIo, "store: " + socket.error().reason});
  Connection made{std::move(*socket), {}};
  NIXL_TRY(net::send_all(made.socket.get(), tcp_store::encode({Verb::kValidate, {}, "", tcp_store::kMagic}), deadline));
  return made;
}

std::unique_ptr<TcpStore::Connection> TcpStore::take_idle() {
  const std::lock_guard lock(mutex_);
  if (idle_.empty()) return nullptr;
  std::unique_ptr<Connection> connection = std::move(idle_.back());
  idle_.pop_back();
  return connection;
}

const StoreEntry& store_tcp() {
  static const StoreEntry entry{"tcp", TcpStore::open};
  return entry;
}

}  // namespace nixl::core
