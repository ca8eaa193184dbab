#include "tables.h"

namespace nixl::core {

// What the documentation names. A backend that is in the build answers for itself and its line here is not used.
std::span<const KnownBackend> known_backends() {
  using enum MemKind;
  static const KnownBackend kKnown[] = {
      {"UCX", {kDram, kVram}, true, true, true,
       "not in this build: UCX's headers were not found; pip install libucx-cu13 (or libucx-dev) and build again"},
      {"UCX_MO", {kDram, kVram}, true, true, true,
       "not in this build: it comes with backend UCX; pip install libucx-cu13 (or libucx-dev) and build again"},
      {"GPUNETIO", {kVram, kDram}, true, false, true,
       "not in this build; it needs an NVIDIA GPU, a ConnectX-6 Dx or newer adapter and libdoca_gpunetio.so"},
      {"Mooncake", {kDram, kVram}, true, true, true,
       "not in this build; it needs libtransfer_engine.so (pip install mooncake-transfer-engine)"},
      {"LIBFABRIC", {kDram, kVram}, true, true, true, "not in this build; it needs libfabric.so.1, 1.17 or above"},
      {"GDS", {kVram, kDram, kFile}, false, true, false,
       "not in this build; it needs libcuda.so.1 and libcufile.so.0 (ls /usr/local/cuda/gds/)"},
      {"GDS_MT", {kVram, kDram, kFile}, false, true, false,
       "not in this build; it needs libcuda.so.1 and libcufile.so.0 (ls /usr/local/cuda/gds/)"},
      {"POSIX", {kDram, kFile}, false, true, false, "not in this build"},
      {"HF3FS", {kDram, kVram, kFile}, false, true, false,
       "not in this build; it needs libhf3fs_api_shared.so and a mounted 3FS"},
      {"OBJ", {kDram, kObject}, false, true, false,
       "not in this build; it needs libcurl (libcurl4-openssl-dev to build)"},
      {"GUSLI", {kVram, kDram, kBlock}, false, true, false, "not in this build; it needs libgusli_clnt.so for network devices"},
      {"AZURE_BLOB", {kDram, kObject}, false, true, false, "not in this build; it needs libcurl (libcurl4-openssl-dev to build)"},
      {"UCCL", {kDram, kVram}, true, true, true, "not in this build; it needs the UCCL P2P engine library (pip install uccl)"},
      {"INFINIA", {kDram, kVram, kObject}, false, true, false, "not in this build; it needs the DDN Infinia client library"},
  };
  return kKnown;
}

}  // namespace nixl::core
