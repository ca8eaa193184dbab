#include "backends/storage/file_query.h"

#include "fileio/file.h"

namespace nixl::core {

Result<std::vector<std::optional<Params>>> FileQuery::query(std::span<const Region> regions) {
  std::vector<std::optional<Params>> answers;
  for (const Region& region : regions) {
    NIXL_ASSIGN(const auto mode, fileio::parse_path_mode(region.meta));
    NIXL_ASSIGN(const auto info, fileio::file_info(mode ? mode->path : region.meta));
    answers.push_back(std::nullopt);
    if (info)
      answers.back() = Params{{"size", std::to_string(info->size)},
                              {"mode", std::to_string(info->mode)},
                              {"mtime", std::to_string(info->mtime)}};
  }
  return answers;
}

}  // namespace nixl::core
