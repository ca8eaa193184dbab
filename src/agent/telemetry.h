// Counts and times of an agent's transfers, handed to a sink: a ring buffer in a file, or a Prometheus endpoint.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

#include "base/result.h"
#include "contract/plan.h"

namespace nixl::core {

class Settings;
struct TransferTimes;

// Event numbers as written to the ring buffer.
enum class Metric : std::uint32_t {
  kTxBytes, kRxBytes, kTxRequests, kRxRequests, kMemoryRegistered, kMemoryDeregistered, kTransferTime, kPostTime,
  kFirstError,                                // 8..19: errors with status -1..-12
  kEventsDropped = 20,
};

// Receives what happened. Called from any thread; must be quick.
class TelemetrySink {
 public:
  virtual ~TelemetrySink() = default;
  struct Event {
    Metric metric;
    std::uint64_t value;
  };
  virtual void add(const Event* events, std::size_t count) = 0;  // one batch is seen whole or not at all
};

class Telemetry {
 public:
  // nullptr when telemetry is off. kMismatch: unknown exporter; kInvalidArgument: a setting's value.
  static Result<std::unique_ptr<Telemetry>> open(const Settings& settings, const std::string& agent, bool wanted);
  explicit Telemetry(std::unique_ptr<TelemetrySink> sink) : sink_(std::move(sink)) {}

  void transfer_done(Op op, const TransferTimes& times);
  void failed(Code code);
  void memory(Metric metric, std::uint64_t bytes);

 private:
  std::unique_ptr<TelemetrySink> sink_;  // null: counted per request only
};

// The status number users see for a code: -1 not posted ... -11 cancelled.
int status_of(Code code) noexcept;

}  // namespace nixl::core
