// How metadata travels between agents without their callers' help: frames over TCP, and keys in a store.
//
// One thread serves the listener and every outgoing connection; it starts with the first use. Store operations run on a second
// thread, so that a slow store does not hold up sockets. Failures are logged with the address or endpoint.
#pragma once
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/clock.h"
#include "base/result.h"
#include "contract/store.h"

namespace nixl::core {

class Catalog;
class Settings;

class Exchange {
 public:
  // What the exchange asks of its agent; called from its threads.
  struct Hooks {
    std::string agent;
    std::function<Result<std::string>()> metadata;
    std::function<Result<std::string>(std::string_view)> load;     // bytes to the peer's name
    std::function<Result<std::string>(std::string_view)> name_in;  // the name in the bytes, nothing loaded
    std::function<void(const std::string&)> remove;
    std::function<bool(const std::string&)> knows;
  };
  struct Options {
    bool listen = false;
    std::uint16_t port = 0;
    std::optional<bool> use_etcd;
    Nanoseconds watch_timeout_ns = 5'000'000'000;  // the setting NIXL_ETCD_WATCH_TIMEOUT, in microseconds, wins
  };
  static Result<std::unique_ptr<Exchange>> open(Hooks hooks, Options options, const Settings& settings,
                                                Catalog& catalog);
  virtual ~Exchange() = default;

  virtual std::uint16_t port() const noexcept = 0;
  virtual bool has_store() const noexcept = 0;
  virtual bool discovers() const noexcept = 0;  // publishes and fetches by itself

  virtual void send(const std::string& ip, std::uint16_t port, std::string bytes) = 0;
  virtual void fetch(const std::string& ip, std::uint16_t port, const std::string& agent) = 0;
  virtual void invalidate(const std::string& ip, std::uint16_t port) = 0;

  // Queued; what is older than that published under the label is left out. When the exchange discovers by itself it waits for the
  // store (seconds at most, and not again soon after a failure).
  virtual void publish(const std::string& label, std::uint64_t revision, std::string bytes) = 0;
  virtual void fetch_stored(const std::string& agent, const std::string& label) = 0;
  // As fetch_stored, but waits until it was loaded; kNotFound when the watch timeout passes.
  virtual Result<void> fetch_now(const std::string& agent) = 0;
  virtual void withdraw() = 0;
  // Before the agent goes: withdraws what was published and stops the threads.
  virtual void close() noexcept = 0;
};

}  // namespace nixl::core
