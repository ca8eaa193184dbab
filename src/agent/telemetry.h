// Counts and times of an agent's transfers, handed to a sink: a ring buffer in a file, or a Prometheus endpoint.
#pragma once
#include <bitset>
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
  kTxBytes,
  kRxBytes,
  kTxRequests,
  kRxRequests,
  kMemoryRegistered,
  kMemoryDeregistered,
  kTransferTime,
  kPostTime,
  kFirstError,  // 8..19: errors with status -1..-12
  kEventsDropped = 20,
};
inline constexpr int kNumMetrics = 21, kNumErrors = 12;
using MetricSet = std::bitset<kNumMetrics>;

const std::string& metric_name(Metric metric);  // "agent_tx_bytes", "agent_errors_not_found"
const char* status_name(int status);            // -4: "NOT_FOUND"
constexpr Metric metric_of_error(int status) {
  return static_cast<Metric>(static_cast<int>(Metric::kFirstError) - 1 - status);
}

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
  Telemetry(std::unique_ptr<TelemetrySink> sink, MetricSet enabled) : sink_(std::move(sink)), enabled_(enabled) {}

  void transfer_done(Op op, const TransferTimes& times);
  void failed(Code code);
  void memory(Metric metric, std::uint64_t bytes);

 private:
  void add(const TelemetrySink::Event* events, std::size_t count);
  std::unique_ptr<TelemetrySink> sink_;  // null: counted per request only
  const MetricSet enabled_;              // NIXL_TELEMETRY_ENABLED_METRICS
};

// The status number users see for a code: -1 not posted ... -11 cancelled.
int status_of(Code code) noexcept;

}  // namespace nixl::core
