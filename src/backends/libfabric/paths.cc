#include "backends/libfabric/paths.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "base/fd.h"

namespace nixl::core::libfabric {
namespace {

bool is_internet(std::uint32_t format) {
  return format == FI_SOCKADDR || format == FI_SOCKADDR_IN || format == FI_SOCKADDR_IN6;
}

// The address alone, without port; empty when it is none.
std::string host_of(const std::string& address) {
  sa_family_t family = AF_UNSPEC;
  if (address.size() < sizeof(sockaddr_in)) return "";
  std::memcpy(&family, address.data(), sizeof family);
  if (family == AF_INET) return address.substr(offsetof(sockaddr_in, sin_addr), sizeof(in_addr));
  if (family == AF_INET6 && address.size() >= sizeof(sockaddr_in6))
    return address.substr(offsetof(sockaddr_in6, sin6_addr), sizeof(in6_addr));
  return "";
}

// The address of ours from which the kernel would send there; empty: no route. Nothing is sent.
std::string source_towards(const std::string& address) {
  if (host_of(address).empty()) return "";
  sockaddr_storage there{};
  const std::size_t length = std::min(address.size(), sizeof there);
  std::memcpy(&there, address.data(), length);
  const Fd socket(::socket(there.ss_family, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (!socket ||
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&there), static_cast<socklen_t>(length)) != 0)
    return "";
  sockaddr_storage here{};
  socklen_t size = sizeof here;
  if (::getsockname(socket.get(), reinterpret_cast<sockaddr*>(&here), &size) != 0) return "";
  return host_of(std::string(reinterpret_cast<const char*>(&here), size));
}

Rail* rail_with_host(const std::vector<std::unique_ptr<Rail>>& rails, const std::string& host) {
  const auto found =
      std::find_if(rails.begin(), rails.end(), [&](const auto& rail) { return host_of(rail->address()) == host; });
  return host.empty() || found == rails.end() ? nullptr : found->get();
}

}  // namespace

std::vector<Link::Target> find_paths(const std::vector<std::unique_ptr<Rail>>& rails, const ConnectionBytes& peer) {
  std::vector<Link::Target> targets;
  const bool internet = is_internet(peer.address_format);
  for (std::uint32_t i = 0; i < peer.rails.size(); ++i) {
    const RailAddress& there = peer.rails[i];
    Rail* ours = nullptr;
    if (internet) {
      ours = rail_with_host(rails, source_towards(there.address));
    } else {
      std::vector<Rail*> same_fabric;
      for (const auto& rail : rails)
        if (rail->fabric() == there.fabric) same_fabric.push_back(rail.get());
      if (!same_fabric.empty()) ours = same_fabric[i % same_fabric.size()];
    }
    if (ours) targets.push_back({ours, i, there.address});
  }
  return targets;
}

}  // namespace nixl::core::libfabric
