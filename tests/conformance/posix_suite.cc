// The suite on POSIX: each engine forced, through the page cache and around it.
#include <cstdio>

#include "backends/posix/posix.h"
#include "conformance/file_target.h"

using namespace nixl::core;

int main(int argc, char** argv) {
  conformance::BackendCase which;
  which.entry = &backends_of_posix()[0];
  which.bad_params = {{{"use_uring", "perhaps"}}, {{"kernel_queue_size", "deep"}}};
  for (const char* flags : {"rw:", "rw,direct:"})
    for (const char* engine : {"", "use_aio", "use_uring", "use_posix_aio"}) {
      std::fprintf(stderr, "engine: %s, file: %s\n", *engine ? engine : "automatic", flags);
      which.params.clear();
      if (*engine) which.params[engine] = "true";
      which.make_target = [&](std::size_t bytes) {
        return std::make_unique<conformance::FileTarget>("/tmp", bytes, flags);
      };
      if (const int status = conformance::run_backend_suite(which, argc, argv)) return status;
    }
  return 0;
}
