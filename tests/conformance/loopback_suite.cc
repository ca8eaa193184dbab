// The suite on the reference backend, as it is and with its fault plan at work.
#include <cstdlib>

#include "backends/loopback/loopback.h"
#include "conformance/backend_suite.h"

using namespace nixl::core;

int main(int argc, char** argv) {
  setenv("NIXL_LOOPBACK", "y", 1);
  conformance::BackendCase which;
  which.entry = &backends_of_loopback()[0];
  which.bad_params = {{{"delay_us", "soon"}}, {{"fail_nth", "-1"}}};
  if (const int status = conformance::run_backend_suite(which, argc, argv)) return status;
  which.params = {{"delay_us", "50"}, {"reorder", "true"}, {"max_running", "1"}};
  return conformance::run_backend_suite(which, argc, argv);
}
