#include "backends/gpunetio/options.h"

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "base/env.h"

namespace nixl::core::gpunetio {
namespace {

tl::unexpected<Error> bad(const char* key, const std::string& value, const std::string& needed) {
  return fail(Code::kInvalidArgument, "GPUNETIO parameter %s is '%s': %s", key, value.c_str(), needed.c_str());
}

std::string value_of(const Params& params, const char* key) {
  const auto found = params.find(key);
  return found == params.end() ? "" : found->second;
}

std::string listed(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text.empty() ? "none" : text;
}

template <typename T>
bool has_twice(std::vector<T> list) {
  std::sort(list.begin(), list.end());
  return std::adjacent_find(list.begin(), list.end()) != list.end();
}

Result<std::vector<std::string>> network_devices(const std::string& text, const Machine& machine) {
  const std::vector<std::string> present = mlx5_devices(machine);
  std::vector<std::string> wanted = parse_words(text);
  if (wanted.empty()) wanted = {"mlx5_0"};
  for (const std::string& name : wanted)
    if (std::find(present.begin(), present.end(), name) == present.end())
      return bad("network_devices", text, "'" + name + "' is no mlx5 device; here are: " + listed(present));
  if (has_twice(wanted)) return bad("network_devices", text, "every device may be named once");
  return wanted;
}

Result<std::vector<int>> gpu_devices(const std::string& text) {
  std::vector<int> ordinals;
  for (const std::string& word : parse_words(text)) {
    const auto ordinal = parse_int(word);
    if (!ordinal || *ordinal < 0 || *ordinal > 1023)
      return bad("gpu_devices", text, "CUDA ordinals from 0 on are needed, with commas");
    ordinals.push_back(static_cast<int>(*ordinal));
  }
  if (ordinals.empty()) ordinals = {0};
  if (has_twice(ordinals)) return bad("gpu_devices", text, "every GPU may be named once");
  return ordinals;
}

Result<std::vector<std::uint64_t>> cuda_streams(const std::string& text) {
  std::vector<std::uint64_t> handles;
  for (const std::string& word : parse_words(text)) {
    const bool hex = word.starts_with("0x");
    const char *start = word.data() + (hex ? 2 : 0), *end = word.data() + word.size();
    std::uint64_t handle = 0;
    const auto [stop, error] = std::from_chars(start, end, handle, hex ? 16 : 10);
    if (error != std::errc() || stop != end)
      return bad("cuda_streams", text, "handles of CUDA streams are needed, decimal or 0x..., with commas");
    handles.push_back(handle);
  }
  if (handles.size() > kNumPostStreams)
    return bad("cuda_streams", text, "at most " + std::to_string(kNumPostStreams) + " streams are used");
  return handles;
}

}  // namespace

Result<Options> read_options(const Params& params, const Machine& machine) {
  Options options;
  NIXL_ASSIGN(options.network_devices, network_devices(value_of(params, "network_devices"), machine));
  NIXL_ASSIGN(options.gpu_devices, gpu_devices(value_of(params, "gpu_devices")));
  NIXL_ASSIGN(options.cuda_streams, cuda_streams(value_of(params, "cuda_streams")));
  options.oob_interface = value_of(params, "oob_interface");
  std::error_code ignored;
  if (!options.oob_interface.empty() &&
      (options.oob_interface.find('/') != std::string::npos ||
       !std::filesystem::exists(machine.network_folder + "/" + options.oob_interface, ignored)))
    return bad("oob_interface", options.oob_interface, "it is no network interface in " + machine.network_folder);
  return options;
}

}  // namespace nixl::core::gpunetio
