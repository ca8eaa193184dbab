// The suite on HF3FS, over a library that serves a directory under the names of the 3FS client.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "backends/hf3fs/hf3fs.h"
#include "conformance/backend_suite.h"

using namespace nixl::core;

namespace {

class FileInMount final : public conformance::Target {
 public:
  FileInMount(const std::string& mount, std::size_t bytes, std::string flags) : flags_(std::move(flags)) {
    path_ = mount + "/file_XXXXXX";
    ::close(::mkstemp(path_.data()));
    (void)!::truncate(path_.c_str(), static_cast<off_t>(bytes));
  }
  ~FileInMount() override { ::unlink(path_.c_str()); }
  Region region() const override { return {MemKind::kFile, 0, 0, 1, flags_ + path_}; }
  std::string contents() override {
    std::ostringstream bytes;
    bytes << std::ifstream(path_, std::ios::binary).rdbuf();
    return bytes.str();
  }
  void set_contents(const std::string& bytes) override { std::ofstream(path_, std::ios::binary) << bytes; }

 private:
  std::string flags_, path_;
};

}  // namespace

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
    which.make_target = [&](std::size_t bytes) { return std::make_unique<FileInMount>(mount, bytes, flags); };
    status = conformance::run_backend_suite(which, argc, argv);
    if (status) break;
  }
  ::rmdir(mount);
  return status;
}
