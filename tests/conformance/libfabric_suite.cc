#include <cstdio>

#include "backends/libfabric/entry.h"
#include "conformance/backend_suite.h"

using namespace nixl::core;

int main(int argc, char** argv) {
  conformance::BackendCase libfabric;
  libfabric.entry = &backends_of_libfabric()[0];
  libfabric.params = {{"provider", "tcp"}};
  libfabric.bad_params = {{{"num_threads", "-1"}},          {{"split_batch_size", "0"}},
                          {{"striping_threshold", "many"}}, {{"max_bw_per_dram_seg", "-3"}},
                          {{"post_queue_size", "none"}},    {{"provider", "pigeons"}}};
  if (const int status = conformance::run_backend_suite(libfabric, argc, argv)) return status;
  libfabric.bad_params.clear();
  libfabric.max_bytes = 4 << 20;
  std::fprintf(stderr, "-- a provider with other queues; little may be in flight\n");
  libfabric.params = {{"provider", "sockets"}, {"post_queue_size", "7"}, {"split_batch_size", "3"}};
  if (const int status = conformance::run_backend_suite(libfabric, argc, argv)) return status;
  std::fprintf(stderr, "-- a thread of the backend's own\n");
  libfabric.params = {{"provider", "tcp"}, {"num_threads", "2"}};
  return conformance::run_backend_suite(libfabric, argc, argv);
}
