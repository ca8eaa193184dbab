// Telemetry as a Prometheus page over HTTP on 127.0.0.1 or every interface.
#pragma once
#include "agent/telemetry.h"

namespace nixl::core {

// Of this agent. NIXL_TELEMETRY_PROMETHEUS_PORT (9090; 0: any), NIXL_TELEMETRY_PROMETHEUS_LOCAL (y: only 127.0.0.1),
// NIXL_TELEMETRY_HISTOGRAM_BUCKETS_US. A busy port is a warning: counting goes on, nobody can read it.
Result<std::unique_ptr<TelemetrySink>> open_prometheus(const Settings& settings, const std::string& agent,
                                                       MetricSet shown);

// Of all processes that share NIXL_TELEMETRY_MULTIPROC_DIR: each writes its page there every NIXL_TELEMETRY_RUN_INTERVAL ms (100), and the
// one of rank 0 serves them as one. The rank is in the variable that NIXL_TELEMETRY_RANK_ENV names (LOCAL_RANK). Pages of processes
// that have not written for NIXL_TELEMETRY_MP_STALE_TTL seconds (30) are removed.
Result<std::unique_ptr<TelemetrySink>> open_shared_prometheus(const Settings& settings, const std::string& agent,
                                                              MetricSet shown);

}  // namespace nixl::core
