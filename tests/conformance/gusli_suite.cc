// The suite on GUSLI: a regular file as the volume.
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "backends/gusli/gusli.h"
#include "conformance/backend_suite.h"

using namespace nixl::core;

namespace {

std::string path = "/tmp/nixl_gusli_suite_XXXXXX";

class VolumeFile final : public conformance::Target {
 public:
  explicit VolumeFile(std::size_t bytes) { (void)!::truncate(path.c_str(), static_cast<off_t>(bytes)); }
  Region region() const override { return {MemKind::kBlock, 0, 0, 3, ""}; }
  std::string contents() override {
    std::ostringstream bytes;
    bytes << std::ifstream(path, std::ios::binary).rdbuf();
    return bytes.str();
  }
  void set_contents(const std::string& bytes) override { std::ofstream(path, std::ios::binary) << bytes; }
};

}  // namespace

int main(int argc, char** argv) {
  ::close(::mkstemp(path.data()));
  conformance::BackendCase which;
  which.entry = &backends_of_gusli()[0];
  which.params = {{"config_file", "version=1\n3 F W N " + path + " sec=0x3\n"}};
  which.bad_params = {{{"try_use_uring", "perhaps"}}, {{"config_file", "version=9"}}};
  which.make_target = [](std::size_t bytes) { return std::make_unique<VolumeFile>(bytes); };
  const int status = conformance::run_backend_suite(which, argc, argv);
  ::unlink(path.c_str());
  return status;
}
