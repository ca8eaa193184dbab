// The suite on HF3FS, over a library that serves a directory under the names of the 3FS client.
#include <unistd.h>

#include <cstdlib>

#include "backends/hf3fs/hf3fs.h"
#include "conformance/file_target.h"

using namespace nixl::core;

int main(int argc, char** argv) {
  char mount[] = "/tmp/nixl_3fs_XXXXXX";
  if (!::mkdtemp(mount)) return 1;
  ::setenv("NIXL_HF3FS_LIBRARY", STAND_IN_3FS, 1);
  ::setenv("STAND_IN_3FS_MOUNT", mount, 1);
  conformance::BackendCase which;
  which.entry = &backends_of_hf3fs()[0];
  which.params = {{"mount_point", mount}};
  which.bad_params = {{{"mem_config", "shared"}}, {{"iopool_size", "many"}}, {{"mount_point", "/tmp"}}};
  int status = 0;
  for (const char* flags : {"rw:", "rw,direct:"}) {
    which.make_target = [&](std::size_t bytes) {
      return std::make_unique<conformance::FileTarget>(mount, bytes, flags);
    };
    status = conformance::run_backend_suite(which, argc, argv);
    if (status) break;
  }
  ::rmdir(mount);
  return status;
}
