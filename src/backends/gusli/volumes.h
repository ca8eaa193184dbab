// The volumes of a GUSLI configuration text:
//     version=1
//     # comment
//     <id> <F|K|N> <W|R> <N|Y> <path> <sec=0x..>
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "fileio/file.h"

namespace nixl::core::gusli {

struct Volume {
  std::uint64_t id = 0;
  bool kernel_device = false;
  bool writable = false;
  std::string path;
  std::uint32_t block_bytes = 1;  // offsets and lengths are multiples of it
  std::shared_ptr<fileio::File> file;

  // Bytes at this moment; a file may grow. UINT64_MAX: no end (character devices).
  Result<std::uint64_t> size() const;
};

// kInvalidArgument naming the line; kUnsupported for a network volume; kIo where a path cannot be opened.
Result<std::map<std::uint64_t, std::shared_ptr<Volume>>> open_volumes(std::string_view text);

}  // namespace nixl::core::gusli
