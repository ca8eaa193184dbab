// Each reason why GPUNETIO is not to be had, and its parameters, on machines made up of folders and of a loader that answers as told.
#include "backends/gpunetio/gpunetio.h"

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "backends/gpunetio/entry.h"
#include "backends/gpunetio/options.h"
#include "check.h"

using namespace nixl::core;
using namespace nixl::core::gpunetio;
namespace fs = std::filesystem;

namespace {

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// A machine with everything; tests take things away.
struct Everything {
  fs::path root = fs::temp_directory_path() / ("nixl_gpunetio_" + std::to_string(::getpid()));
  std::set<std::string> absent;
  bool has_gpu = true;
  Machine machine;
  Everything() {
    for (const char* device : {"mlx5_0", "rocep1s0", "irdma0"}) {
      fs::create_directories(root / "rdma" / device / "device");
      const char* driver = device[0] == 'i' ? "irdma" : "mlx5_core";
      fs::create_symlink("/drivers/" + std::string(driver), root / "rdma" / device / "device/driver");
    }
    fs::create_directories(root / "peermem");
    fs::create_directories(root / "net/eth7");
    machine.cuda = [this]() -> Result<void> {
      if (has_gpu) return {};
      return fail(Code::kUnsupported, "no NVIDIA GPU");
    };
    machine.library = [this](const char* soname) -> Result<void> {
      if (!absent.count(soname)) return {};
      return fail(Code::kUnsupported, "%s: cannot open shared object file", soname);
    };
    machine.rdma_folder = root / "rdma";
    machine.peermem_folder = root / "peermem";
    machine.driver_file = root / "version";
    machine.network_folder = root / "net";
  }
  ~Everything() { fs::remove_all(root); }
  std::string only_reason() {
    const auto lines = missing(machine);
    CHECK_EQ(lines.size(), 1u);
    const Probe seen = probe(machine);
    CHECK(!seen.viable && seen.reason == lines[0]);
    const auto opened = gpunetio::open({}, machine);
    CHECK(!opened && opened.error().code == Code::kUnsupported && has(opened.error().reason, lines[0]));
    return lines[0];
  }
};

}  // namespace

TEST(no_cuda_device) {
  Everything all;
  all.has_gpu = false;
  CHECK_EQ(all.only_reason(), "no CUDA device: no NVIDIA GPU");
}

TEST(each_library_by_name) {
  for (const char* soname :
       {"libdoca_gpunetio.so", "libdoca_verbs.so", "libdoca_common.so", "libibverbs.so.1", "libmlx5.so.1"}) {
    Everything all;
    all.absent = {soname};
    CHECK_EQ(all.only_reason(), std::string(soname) + ": cannot open shared object file");
  }
}

TEST(no_mlx5_device) {
  Everything all;
  CHECK(mlx5_devices(all.machine) == (std::vector<std::string>{"mlx5_0", "rocep1s0"}));
  fs::remove_all(all.root / "rdma/mlx5_0");
  fs::remove_all(all.root / "rdma/rocep1s0");  // that of another maker stays
  CHECK_EQ(all.only_reason(), "no mlx5 device in " + all.machine.rdma_folder);
  fs::remove_all(all.root / "rdma");
  CHECK_EQ(all.only_reason(), "no mlx5 device in " + all.machine.rdma_folder);
}

TEST(neither_peermem_nor_dma_buf) {
  Everything all;
  fs::remove_all(all.root / "peermem");
  for (const char* version : {"", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06\n"}) {
    std::ofstream(all.machine.driver_file) << version;
    const std::string reason = all.only_reason();
    CHECK(has(reason, all.machine.peermem_folder) && has(reason, all.machine.driver_file) && has(reason, "dma-buf"));
  }
  std::ofstream(all.machine.driver_file) << "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06\n";
  CHECK(missing(all.machine).empty());
}

TEST(everything_is_here_but_the_data_path) {
  Everything all;
  CHECK(missing(all.machine).empty());
  const Probe seen = probe(all.machine);
  CHECK(!seen.viable && has(seen.reason, "data path is not in this release"));
  BackendConfig config;
  config.params = backends_of_gpunetio()[0].params;
  const auto opened = gpunetio::open(config, all.machine);
  CHECK(!opened && opened.error().code == Code::kUnsupported);
  CHECK(has(opened.error().reason, "data path is not in this release"));
  config.params["gpu_devices"] = "first";
  CHECK(gpunetio::open(config, all.machine).error().code == Code::kInvalidArgument);
}

TEST(all_that_is_missing_is_named_at_once) {
  Everything all;
  all.has_gpu = false;
  all.absent = {"libdoca_gpunetio.so", "libmlx5.so.1"};
  fs::remove_all(all.root);
  CHECK_EQ(missing(all.machine).size(), 5u);
  const std::string reason = probe(all.machine).reason;
  for (const char* part : {"no CUDA device", "libdoca_gpunetio.so", "libmlx5.so.1", "mlx5 device", "nvidia-peermem"})
    CHECK(has(reason, part));
}

TEST(parameters) {
  Everything all;
  const auto unset = CHECK_OK(read_options(backends_of_gpunetio()[0].params, all.machine));
  CHECK(unset->network_devices == std::vector<std::string>{"mlx5_0"} && unset->gpu_devices == std::vector<int>{0});
  CHECK(unset->cuda_streams.empty() && unset->oob_interface.empty());
  const auto given = CHECK_OK(read_options({{"network_devices", "rocep1s0,mlx5_0"},
                                            {"gpu_devices", "3, 1"},
                                            {"cuda_streams", "0x7f00, 12"},
                                            {"oob_interface", "eth7"}},
                                           all.machine));
  CHECK(given->network_devices == (std::vector<std::string>{"rocep1s0", "mlx5_0"}));
  CHECK(given->gpu_devices == (std::vector<int>{3, 1}));
  CHECK(given->cuda_streams == (std::vector<std::uint64_t>{0x7f00, 12}) && given->oob_interface == "eth7");
  struct Wrong {
    const char *key, *value, *needed;
  };
  for (const Wrong& wrong : {Wrong{"network_devices", "mlx5_4", "mlx5_0, rocep1s0"},
                             {"network_devices", "irdma0", "no mlx5 device"},
                             {"network_devices", "mlx5_0,mlx5_0", "once"},
                             {"gpu_devices", "0,one", "ordinals"},
                             {"gpu_devices", "-1", "ordinals"},
                             {"gpu_devices", "2,2", "once"},
                             {"cuda_streams", "0xzz", "handles"},
                             {"cuda_streams", "0x", "handles"},
                             {"cuda_streams", "1,2,3,4,5", "at most 4"},
                             {"oob_interface", "eth8", "no network interface"},
                             {"oob_interface", "../net/eth7", "no network interface"}}) {
    const auto refused = read_options({{wrong.key, wrong.value}}, all.machine);
    CHECK(!refused && refused.error().code == Code::kInvalidArgument);
    for (const char* part : {wrong.key, wrong.value, wrong.needed}) CHECK(has(refused.error().reason, part));
  }
}

TEST(this_machine) {
  const BackendEntry& entry = backends_of_gpunetio()[0];
  const Probe seen = entry.probe();
  CHECK(!seen.viable && !seen.reason.empty());
  const auto none = Machine::this_one().library("libnixl_of_nobody.so");
  CHECK(!none && has(none.error().reason, "libnixl_of_nobody.so: cannot open shared object file"));
  CHECK_OK(Machine::this_one().library("libm.so.6"));
  CHECK(entry.remote && entry.notifications && !entry.local);  // transfers to oneself are refused by the agent
  BackendConfig config;
  config.params = entry.params;
  const auto opened = entry.open(std::move(config));
  CHECK(!opened && has(opened.error().reason, seen.reason));
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
