#include <cstdio>

#include "backends/ucx/entry.h"
#include "conformance/backend_suite.h"

using namespace nixl::core;

int main(int argc, char** argv) {
  conformance::BackendCase ucx;
  ucx.entry = &backends_of_ucx()[0];
  ucx.bad_params = {{{"num_workers", "zero"}},
                    {{"num_threads", "-1"}},
                    {{"ucx_error_handling_mode", "sometimes"}},
                    {{"ucx_ep_close_force", "perhaps"}},
                    {{"engine_config", "no equals sign"}}};
  if (const int status = conformance::run_backend_suite(ucx, argc, argv)) return status;
  std::fprintf(stderr, "-- what crosses hosts without RDMA: TCP alone, reads by request\n");
  ucx.params = {{"UCX_TLS", "tcp"}, {"num_workers", "2"}};
  if (const int status = conformance::run_backend_suite(ucx, argc, argv)) return status;
  std::fprintf(stderr, "-- requests shared out among threads\n");
  ucx.params = {{"UCX_TLS", "tcp"}, {"num_threads", "2"}, {"split_batch_size", "2"}};
  if (const int status = conformance::run_backend_suite(ucx, argc, argv)) return status;
  std::fprintf(stderr, "-- several engines\n");
  ucx.entry = &backends_of_ucx()[1];
  ucx.params = {{"num_ucx_engines", "3"}};
  ucx.bad_params = {{{"num_ucx_engines", "many"}}};
  return conformance::run_backend_suite(ucx, argc, argv);
}
