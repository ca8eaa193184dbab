// Telemetry as a Prometheus page over HTTP on 127.0.0.1 or every interface.
#pragma once
#include "agent/telemetry.h"

namespace nixl::core {

// NIXL_TELEMETRY_PROMETHEUS_PORT (9090; 0: any), NIXL_TELEMETRY_PROMETHEUS_LOCAL (y: only 127.0.0.1),
// NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US. A busy port is a warning: counting goes on, nobody can read it.
Result<std::unique_ptr<TelemetrySink>> open_prometheus(const Settings& settings, const std::string& agent);

}  // namespace nixl::core
