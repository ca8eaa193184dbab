// Times of kernels as the profiler records them (CUPTI), by their names.
#pragma once
#include <string>
#include <vector>

namespace gpu_test {

struct KernelRecord {
  std::string name;  // demangled
  double begin_us = 0, us = 0;
};

// Begins to record the kernels of this process; "", or why it cannot. CUPTI is opened now: NIXL_CUPTI names the library where the
// loader does not find it.
std::string start_recording();
// All kernels that ended since, in the order they began. The device is idle when this is called.
std::vector<KernelRecord> take_records();

}  // namespace gpu_test
