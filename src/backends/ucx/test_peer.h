// For UCX's tests between processes: peers by their transports.
#pragma once
#include "backends/ucx/entry.h"
#include "peer_process.h"

namespace nixl::core::ucx::test {

using core::test::kBytes;
using core::test::kPatience;
using core::test::Node;
using core::test::TwoHosts;

// Two namespaces have one boot id, so that UCX would try the loopback device between them: then the device is named.
inline Params params(const std::string& tls, const std::string& device = "") {
  return {{"UCX_TLS", tls}, {"UCX_NET_DEVICES", device}};
}

struct Peer : core::test::Peer {
  Peer(std::uint64_t incarnation, const std::string& tls) : core::test::Peer(incarnation, params(tls)) {}
};

struct Pair : core::test::Pair {
  explicit Pair(const std::string& tls) : core::test::Pair(params(tls), params(tls)) {}
  Pair(const std::string& tls, const TwoHosts& hosts)
      : core::test::Pair(params(tls, hosts.name + "a"), params(tls, hosts.name + "b"), hosts.pid) {}
};

}  // namespace nixl::core::ucx::test
