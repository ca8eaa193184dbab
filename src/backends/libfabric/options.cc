#include "backends/libfabric/options.h"

#include "base/env.h"

namespace nixl::core::libfabric {
namespace {

struct Known {
  const char *name, *variable, *fallback;
  std::int64_t least, most;  // of numbers
};
constexpr Known kThreads{"num_threads", "NIXL_LIBFABRIC_NUM_THREADS", "0", 0, 64};
constexpr Known kBatch{"split_batch_size", "NIXL_LIBFABRIC_SPLIT_BATCH_SIZE", "1024", 1, 1 << 30};
constexpr Known kStriping{"striping_threshold", "NIXL_LIBFABRIC_STRIPING_THRESHOLD", "131072", 1, INT64_MAX};
constexpr Known kBandwidth{"max_bw_per_dram_seg", "NIXL_LIBFABRIC_MAX_BW_PER_DRAM_SEG", "0", 0, 1'000'000};
constexpr Known kQueue{"post_queue_size", "NIXL_LIBFABRIC_POST_QUEUE_SIZE", "32768", 1, 1 << 24};
constexpr Known kProvider{"provider", "NIXL_LIBFABRIC_PROVIDER", "auto", 0, 0};

struct Value {
  std::string text, origin;
};

Value value_of(const Params& params, const Known& known) {
  const auto found = params.find(known.name);
  if (found != params.end() && !found->second.empty() && found->second != known.fallback)
    return {found->second, std::string("LIBFABRIC parameter ") + known.name};
  if (auto text = env_text(known.variable)) return {*text, known.variable};
  return {known.fallback, known.name};
}

Result<std::uint64_t> number(const Params& params, const Known& known) {
  const Value value = value_of(params, known);
  const auto parsed = parse_int(value.text);
  if (!parsed || *parsed < known.least || *parsed > known.most)
    return fail(Code::kInvalidArgument, "%s = '%s': an integer from %lld to %lld is needed", value.origin.c_str(),
                value.text.c_str(), static_cast<long long>(known.least), static_cast<long long>(known.most));
  return static_cast<std::uint64_t>(*parsed);
}

}  // namespace

Params default_params() {
  Params params;
  for (const Known& known : {kThreads, kBatch, kStriping, kBandwidth, kQueue, kProvider})
    params[known.name] = known.fallback;
  return params;
}

Result<Options> parse_options(const Params& params) {
  Options options;
  NIXL_ASSIGN(const auto threads, number(params, kThreads));
  options.own_thread = threads > 0;
  NIXL_ASSIGN(options.split_batch_size, number(params, kBatch));
  NIXL_ASSIGN(options.striping_threshold, number(params, kStriping));
  NIXL_ASSIGN(options.max_gbits_per_segment, number(params, kBandwidth));
  NIXL_ASSIGN(options.post_queue_size, number(params, kQueue));
  options.provider = value_of(params, kProvider).text;
  return options;
}

}  // namespace nixl::core::libfabric
