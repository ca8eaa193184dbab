// Do files exist? The MemoryQuery of every backend with files: text of a region is a path, or path mode.
#pragma once
#include "contract/backend.h"

namespace nixl::core {

class FileQuery final : public MemoryQuery {
 public:
  Result<std::vector<std::optional<Params>>> query(std::span<const Region> regions) override;
};

}  // namespace nixl::core
