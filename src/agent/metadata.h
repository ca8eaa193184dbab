// The bytes by which agents make each other's acquaintance; layout in docs/wire.md. Pure functions.
#pragma once
#include <string>
#include <string_view>
#include <vector>

#include "base/result.h"
#include "contract/memory.h"

namespace nixl::core {

constexpr std::size_t kMaxName = 4096;  // bytes of the name of an agent or a backend

// Where an agent lives, so that a survivor on the same machine can tell whether it is still there.
struct Home {
  std::string host;  // boot id and process-id namespace
  std::uint64_t process = 0;
  std::uint64_t started = 0;  // start time of the process, clock ticks since boot
};
Home home_of_this_process();
// true only when it is certain that the process is gone.
bool surely_dead(const Home&);

struct RegionInfo {
  Region region;  // meta is not carried
  std::string key;
};

struct BackendInfo {
  std::string name;
  bool has_connection = false;
  std::string connection;
  std::vector<RegionInfo> regions;
};

struct Metadata {
  std::string agent;
  std::uint64_t incarnation = 0;
  std::uint64_t revision = 0;  // of two of one incarnation, the higher is the newer
  bool complete = false;       // holds every region that the agent had at that revision
  Home home;
  std::vector<BackendInfo> backends;
};

std::string encode(const Metadata&);
// kMismatch with the reason for anything that is not whole, of this version and intact.
Result<Metadata> decode(std::string_view bytes);

}  // namespace nixl::core
