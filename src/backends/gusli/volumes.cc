#include "backends/gusli/volumes.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <sstream>
#include <vector>

#include "base/env.h"

namespace nixl::core::gusli {
namespace {

tl::unexpected<Error> bad_line(std::size_t number, const std::string& line, const std::string& why) {
  return fail(Code::kInvalidArgument, "GUSLI parameter config_file, line %zu \"%s\": %s", number, line.c_str(),
              why.c_str());
}

bool one_of(const std::string& word, const char* letters) {
  return word.size() == 1 && std::string_view(letters).find(word[0]) != std::string_view::npos;
}

Result<std::shared_ptr<Volume>> open_volume(std::size_t number, const std::string& line) {
  std::istringstream in(line);
  std::vector<std::string> words;
  for (std::string word; in >> word;) words.push_back(word);
  if (words.size() != 6)
    return bad_line(number, line, "six words are needed: id, type, access, shared, path, security");
  const auto id = parse_int(words[0]);
  if (!id || *id < 0) return bad_line(number, line, "the id must be a number >= 0");
  if (!one_of(words[1], "FKN"))
    return bad_line(number, line, "the type must be F (file), K (kernel device) or N (network server)");
  if (!one_of(words[2], "WR")) return bad_line(number, line, "the access must be W or R");
  if (!one_of(words[3], "NY")) return bad_line(number, line, "shared must be N or Y");
  if (words[5].rfind("sec=", 0) != 0) return bad_line(number, line, "the security must look like sec=0x3");
  if (words[1] == "N")
    return fail(Code::kUnsupported,
                "GUSLI volume %s at %s needs the client library libgusli_clnt.so, which this build does not "
                "drive; files (F) and kernel devices (K) work without it",
                words[0].c_str(), words[4].c_str());
  auto volume = std::make_shared<Volume>();
  volume->id = static_cast<std::uint64_t>(*id);
  volume->kernel_device = words[1] == "K";
  volume->writable = words[2] == "W";
  volume->path = words[4];
  const int flags = (volume->writable ? O_RDWR : O_RDONLY) | (volume->kernel_device ? O_DIRECT : 0);
  auto file = fileio::File::open({flags, volume->path});
  if (!file) return fail(within("GUSLI volume " + words[0], std::move(file).error()));
  volume->file = std::move(*file);
  if (volume->kernel_device) {
    int bytes = 0;
    if (::ioctl(volume->file->fd(), BLKSSZGET, &bytes) != 0)
      return bad_line(number, line, volume->path + " is no block device (type F takes files): " + errno_text(errno));
    volume->block_bytes = static_cast<std::uint32_t>(bytes);
  }
  return volume;
}

}  // namespace

Result<std::uint64_t> Volume::size() const {
  struct stat status;
  if (::fstat(file->fd(), &status) != 0) return fail(errno_error("stat of " + path, errno));
  if (S_ISREG(status.st_mode)) return static_cast<std::uint64_t>(status.st_size);
  std::uint64_t bytes = 0;
  if (S_ISBLK(status.st_mode) && ::ioctl(file->fd(), BLKGETSIZE64, &bytes) != 0)
    return fail(errno_error("size of " + path, errno));
  return S_ISBLK(status.st_mode) ? bytes : UINT64_MAX;
}

Result<std::map<std::uint64_t, std::shared_ptr<Volume>>> open_volumes(std::string_view text) {
  std::map<std::uint64_t, std::shared_ptr<Volume>> volumes;
  std::istringstream in{std::string(text)};
  std::size_t number = 0;
  bool versioned = false;
  for (std::string line; std::getline(in, line);) {
    ++number;
    while (!line.empty() && (line.back() == ' ' || line.back() == '\r' || line.back() == '\t')) line.pop_back();
    if (line.empty() || line[0] == '#') continue;
    if (!versioned) {
      if (line != "version=1") return bad_line(number, line, "the first line must be version=1");
      versioned = true;
      continue;
    }
    NIXL_ASSIGN(auto volume, open_volume(number, line));
    const std::uint64_t id = volume->id;
    if (!volumes.emplace(id, std::move(volume)).second) return bad_line(number, line, "the id is used twice");
  }
  return volumes;
}

}  // namespace nixl::core::gusli
