// The suite on POSIX: each engine forced, through the page cache and around it.
#include <fcntl.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "backends/posix/posix.h"
#include "conformance/backend_suite.h"

using namespace nixl::core;

namespace {

class FileOnDisk final : public conformance::Target {
 public:
  FileOnDisk(std::size_t bytes, std::string flags) : flags_(std::move(flags)) {
    char text[] = "/tmp/nixl_suite_XXXXXX";
    ::close(::mkstemp(text));
    path_ = text;
    (void)!::truncate(text, static_cast<off_t>(bytes));
  }
  ~FileOnDisk() override { ::unlink(path_.c_str()); }
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
  conformance::BackendCase which;
  which.entry = &backends_of_posix()[0];
  which.bad_params = {{{"use_uring", "perhaps"}}, {{"kernel_queue_size", "deep"}}};
  for (const char* flags : {"rw:", "rw,direct:"})
    for (const char* engine : {"", "use_aio", "use_uring", "use_posix_aio"}) {
      std::fprintf(stderr, "engine: %s, file: %s\n", *engine ? engine : "automatic", flags);
      which.params.clear();
      if (*engine) which.params[engine] = "true";
      which.make_target = [&](std::size_t bytes) { return std::make_unique<FileOnDisk>(bytes, flags); };
      if (const int status = conformance::run_backend_suite(which, argc, argv)) return status;
    }
  return 0;
}
