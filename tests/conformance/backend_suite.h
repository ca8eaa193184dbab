// One suite for every backend. A test program describes its backend and calls run_backend_suite; see loopback_suite.cc.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "contract/entry.h"

namespace nixl::core::conformance {

// Where the remote side of storage transfers lies: a file, volume or object of at least the size asked for.
class Target {
 public:
  virtual ~Target() = default;
  virtual Region region() const = 0;   // as a user would register it
  virtual std::string contents() = 0;  // all bytes, read past the backend
  virtual void set_contents(const std::string& bytes) = 0;
};

struct BackendCase {
  const BackendEntry* entry = nullptr;
  Params params;                   // over the entry's defaults
  std::vector<Params> bad_params;  // each must be refused by open(), the reason naming the first key
  // Storage backends: makes a target; memory backends leave it empty and two backends of this process talk to each other.
  std::function<std::unique_ptr<Target>(std::size_t bytes)> make_target;
  std::size_t max_bytes = 64 << 20;  // largest single transfer tried
  std::size_t max_blocks = 10'000;   // largest list tried
  std::size_t alignment = 1;         // of offsets in the target
  bool whole_targets = false;        // a write replaces the target: only writes of all of it are tried
};

// Runs all tests that apply; prints each and those that do not apply with the reason. Returns the exit status: 0, 1, or 77
// when the probe says the backend cannot work here (its reason is printed). `filter` as in check.h.
int run_backend_suite(const BackendCase& which, int argc, char** argv);

}  // namespace nixl::core::conformance
