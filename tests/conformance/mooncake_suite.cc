// The suite on Mooncake, over a library that copies between processes under the names of the transfer engine.
#include <cstdlib>

#include "backends/mooncake/mooncake.h"
#include "conformance/backend_suite.h"

using namespace nixl::core;

int main(int argc, char** argv) {
  ::setenv("NIXL_MOONCAKE_LIBRARY", STAND_IN_MOONCAKE, 0);
  ::setenv("NIXL_MOONCAKE_IP_ADDR", "127.0.0.1", 1);
  conformance::BackendCase which;
  which.entry = &backends_of_mooncake()[0];
  which.bad_params = {{{"protocol", "carrier pigeon"}}, {{"mooncake_devices", "mlx5_99"}}};
  return conformance::run_backend_suite(which, argc, argv);
}
