#include "agent/metadata.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "base/bytes.h"

namespace nixl::core {
namespace {

constexpr std::string_view kMagic = "NIXLMETA";
constexpr std::uint16_t kVersion = 2;
constexpr std::size_t kMaxConnection = 16 << 20;
constexpr std::size_t kMaxKey = 1 << 20;
constexpr std::size_t kHeaderBytes = 8 + 2 + 2 + 8 + 4;

// 0: there is no such process, or all that is left of it waits for its parent.
std::uint64_t start_time(std::uint64_t process) {
  std::ifstream stat("/proc/" + std::to_string(process) + "/stat");
  std::string line;
  if (!std::getline(stat, line)) return 0;
  std::size_t at = line.rfind(')');  // the name before it may hold anything
  if (at == std::string::npos) return 0;
  if (at + 2 < line.size() && (line[at + 2] == 'Z' || line[at + 2] == 'X')) return 0;
  for (int field = 2; field < 22 && at != std::string::npos; ++field) at = line.find(' ', at + 1);
  return at == std::string::npos ? 0 : std::strtoull(line.c_str() + at, nullptr, 10);
}

Result<bool> get_flag(ByteReader& in) {
  NIXL_ASSIGN(const auto flag, in.get<std::uint8_t>());
  if (flag > 1) return fail(Code::kMismatch, "flag %u at offset %zu is not 0 or 1", flag, in.offset() - 1);
  return flag == 1;
}

Result<BackendInfo> decode_backend(ByteReader& in) {
  BackendInfo info;
  NIXL_ASSIGN(info.name, in.get_text(kMaxName));
  NIXL_ASSIGN(info.has_connection, get_flag(in));
  if (info.has_connection) {
    NIXL_ASSIGN(info.connection, in.get_text(kMaxConnection));
  }
  NIXL_ASSIGN(const auto count, in.get<std::uint32_t>());
  constexpr std::size_t kSmallestRegion = 1 + 3 * 8 + 4;
  if (count > in.left() / kSmallestRegion)
    return fail(Code::kMismatch, "%u regions announced, %zu bytes left", count, in.left());
  info.regions.resize(count);
  for (RegionInfo& item : info.regions) {
    NIXL_ASSIGN(const auto kind, in.get<std::uint8_t>());
    if (kind >= kNumMemKinds)
      return fail(Code::kMismatch, "memory kind %u at offset %zu is unknown", kind, in.offset() - 1);
    item.region.kind = static_cast<MemKind>(kind);
    NIXL_ASSIGN(item.region.address, in.get<std::uint64_t>());
    NIXL_ASSIGN(item.region.length, in.get<std::uint64_t>());
    NIXL_ASSIGN(item.region.device, in.get<std::uint64_t>());
    NIXL_ASSIGN(item.key, in.get_text(kMaxKey));
  }
  return info;
}

Result<Metadata> decode_payload(std::string_view payload) {
  ByteReader in(payload);
  Metadata data;
  NIXL_ASSIGN(data.agent, in.get_text(kMaxName));
  if (data.agent.empty()) return fail(Code::kMismatch, "the agent's name is empty");
  NIXL_ASSIGN(data.incarnation, in.get<std::uint64_t>());
  NIXL_ASSIGN(data.revision, in.get<std::uint64_t>());
  NIXL_ASSIGN(data.complete, get_flag(in));
  NIXL_ASSIGN(data.home.host, in.get_text(kMaxName));
  NIXL_ASSIGN(data.home.process, in.get<std::uint64_t>());
  NIXL_ASSIGN(data.home.started, in.get<std::uint64_t>());
  NIXL_ASSIGN(const auto count, in.get<std::uint32_t>());
  if (count > in.left()) return fail(Code::kMismatch, "%u backends announced, %zu bytes left", count, in.left());
  for (std::uint32_t i = 0; i < count; ++i) {
    NIXL_ASSIGN(BackendInfo info, decode_backend(in));
    data.backends.push_back(std::move(info));
  }
  if (in.left()) return fail(Code::kMismatch, "%zu bytes follow the end", in.left());
  return data;
}

}  // namespace

Home home_of_this_process() {
  Home home;
  std::ifstream boot("/proc/sys/kernel/random/boot_id");
  std::getline(boot, home.host);
  char name_space[64] = {};
  if (readlink("/proc/self/ns/pid", name_space, sizeof name_space - 1) > 0) home.host += std::string(" ") + name_space;
  home.process = static_cast<std::uint64_t>(getpid());
  home.started = start_time(home.process);
  return home;
}

bool surely_dead(const Home& other) {
  const Home here = home_of_this_process();
  if (other.host.empty() || other.host != here.host || !other.process) return false;
  if (kill(static_cast<pid_t>(other.process), 0) != 0 && errno == ESRCH) return true;
  return here.started && other.started && start_time(other.process) != other.started;
}

std::string encode(const Metadata& data) {
  ByteWriter payload;
  payload.put_text(data.agent);
  payload.put(data.incarnation);
  payload.put(data.revision);
  payload.put<std::uint8_t>(data.complete);
  payload.put_text(data.home.host);
  payload.put(data.home.process);
  payload.put(data.home.started);
  payload.put(static_cast<std::uint32_t>(data.backends.size()));
  for (const BackendInfo& info : data.backends) {
    payload.put_text(info.name);
    payload.put<std::uint8_t>(info.has_connection);
    if (info.has_connection) payload.put_text(info.connection);
    payload.put(static_cast<std::uint32_t>(info.regions.size()));
    for (const RegionInfo& item : info.regions) {
      payload.put(static_cast<std::uint8_t>(item.region.kind));
      payload.put(item.region.address);
      payload.put(item.region.length);
      payload.put(item.region.device);
      payload.put_text(item.key);
    }
  }
  ByteWriter out;
  out.put_raw(kMagic);
  out.put(kVersion);
  out.put<std::uint16_t>(0);
  out.put<std::uint64_t>(payload.bytes().size());
  out.put(crc32c(payload.bytes()));
  out.put_raw(payload.bytes());
  return out.take();
}

Result<Metadata> decode(std::string_view bytes) {
  if (bytes.size() < kHeaderBytes || bytes.substr(0, kMagic.size()) != kMagic)
    return fail(Code::kMismatch, "%zu bytes that are not agent metadata (no %s header)", bytes.size(), kMagic.data());
  ByteReader in(bytes.substr(kMagic.size()));
  NIXL_ASSIGN(const auto version, in.get<std::uint16_t>());
  if (version != kVersion)
    return fail(Code::kMismatch, "agent metadata of version %u; this library reads version %u", version, kVersion);
  NIXL_ASSIGN(const auto flags, in.get<std::uint16_t>());
  if (flags) return fail(Code::kMismatch, "agent metadata with unknown flags 0x%x", flags);
  NIXL_ASSIGN(const auto length, in.get<std::uint64_t>());
  NIXL_ASSIGN(const auto checksum, in.get<std::uint32_t>());
  if (length != in.left())
    return fail(Code::kMismatch, "agent metadata announces %llu bytes and carries %zu",
                static_cast<unsigned long long>(length), in.left());
  NIXL_ASSIGN(const auto payload, in.get_raw(length));
  if (const std::uint32_t seen = crc32c(payload); seen != checksum)
    return fail(Code::kMismatch, "agent metadata is damaged: checksum %08x, expected %08x", seen, checksum);
  auto data = decode_payload(payload);
  if (!data) return fail(within("agent metadata", data.error()));
  return data;
}

}  // namespace nixl::core
