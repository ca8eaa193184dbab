// In place of ep/cuda in a build without kernels.
#include "ep/path.h"

namespace nixl::core::ep {

std::string cuda_unavailable_reason() {
  return "this libnixl.so was built without CUDA kernels (no nvcc was found, or NIXL_CUDA=OFF); build it again with "
         "nvcc on PATH";
}

Result<std::unique_ptr<Path>> open_cuda_path(const PathOptions&) {
  return fail(Code::kUnsupported, "%s", cuda_unavailable_reason().c_str());
}

}  // namespace nixl::core::ep
