#include "ep/arguments.h"

#include <algorithm>

#include "ep/layout/layout.h"
#include "ep/layout/shape.h"

namespace nixl::core::ep {
namespace {

using Int = long long;

Result<void> check_present(const char* name, const void* pointer) {
  if (!pointer) return fail(Code::kInvalidArgument, "%s is null; its memory is needed", name);
  return {};
}

Result<void> check_shape(std::int64_t max_tokens, std::int64_t hidden, std::int64_t step, int num_ranks,
                         const Limits& limits) {
  const Capacity& capacity = limits.capacity;
  if (hidden <= 0 || hidden > kMaxHidden || hidden % step != 0)
    return fail(Code::kInvalidArgument, "the hidden size is %lld; multiples of %lld up to %lld are allowed here",
                Int(hidden), Int(step), Int(kMaxHidden));
  if (num_ranks < limits.active_rank_bound || num_ranks > capacity.num_ranks)
    return fail(Code::kInvalidArgument,
                "the call covers %d ranks; from %d (the highest active rank is %d) to %d (the capacity) "
                "are allowed",
                num_ranks, limits.active_rank_bound, limits.active_rank_bound - 1, capacity.num_ranks);
  const std::int64_t most_tokens = std::min<std::int64_t>(kMaxTokens, INT32_MAX / num_ranks);  // rows are int32
  if (max_tokens <= 0 || max_tokens > most_tokens)
    return fail(Code::kInvalidArgument, "max_tokens is %lld; 1 to %lld are allowed", Int(max_tokens), Int(most_tokens));
  const std::int64_t num_experts = std::int64_t{capacity.num_ranks} * capacity.experts_per_rank;
  if (!allows(capacity.num_bytes, num_experts, max_tokens, hidden))
    return fail(Code::kInvalidArgument,
                "max_tokens %lld at hidden size %lld needs a buffer of %lld bytes; update_memory got %lld: "
                "pass what the size hint gives for the largest call",
                Int(max_tokens), Int(hidden), Int(size_hint_bytes(max_tokens, hidden, num_experts)),
                Int(capacity.num_bytes));
  return {};
}

// What dispatch and combine have in common: n, and the top-k ids.
template <typename Args>
Result<void> check_selection(const Args& args) {
  if (args.num_tokens < 0 || args.num_tokens > args.max_tokens)
    return fail(Code::kInvalidArgument, "num_tokens is %lld; 0 to max_tokens = %lld are allowed", Int(args.num_tokens),
                Int(args.max_tokens));
  if (args.topk < 1 || args.topk > kMaxTopk)
    return fail(Code::kInvalidArgument, "top-k is %d; 1 to %d are allowed", args.topk, kMaxTopk);
  if (args.index_bytes != 4 && args.index_bytes != 8)
    return fail(Code::kInvalidArgument, "expert ids have %d bytes; int32 and int64 are allowed", args.index_bytes);
  if (args.num_tokens > 0) NIXL_TRY(check_present("topk_idx", args.topk_idx));
  return {};
}

// What dispatch writes and combine reads of a handle.
template <typename Args>
Result<void> check_handle(const Args& args) {
  NIXL_TRY(check_present("src_info", args.src_info));
  NIXL_TRY(check_present("layout_range", args.layout_range));
  if (args.recv_weights && !args.recv_places)
    return fail(Code::kInvalidArgument, "recv_weights needs recv_places, which is null");
  return {};
}

}  // namespace

Result<void> check_capacity(const Capacity& wanted, const Capacity& present, int own_rank) {
  const bool first = present.num_ranks == 0;
  if (!first && (wanted.experts_per_rank != present.experts_per_rank || wanted.num_ranks < present.num_ranks ||
                 wanted.num_bytes < present.num_bytes))
    return fail(Code::kNotAllowed,
                "Multiple calls to update_memory_buffers are not supported except to grow: %d ranks of %d "
                "experts and %lld bytes are there, %d of %d and %lld were asked for",
                present.num_ranks, present.experts_per_rank, Int(present.num_bytes), wanted.num_ranks,
                wanted.experts_per_rank, Int(wanted.num_bytes));
  if (wanted.num_ranks < 1 || wanted.num_ranks > kMaxRanks)
    return fail(Code::kInvalidArgument, "num_ranks is %d; 1 to %d are allowed", wanted.num_ranks, kMaxRanks);
  if (own_rank >= wanted.num_ranks)
    return fail(Code::kInvalidArgument, "num_ranks is %d; it must be above this rank, %d", wanted.num_ranks, own_rank);
  if (wanted.experts_per_rank < 1)
    return fail(Code::kInvalidArgument, "experts per rank are %d; 1 or more are needed", wanted.experts_per_rank);
  if (std::int64_t{wanted.num_ranks} * wanted.experts_per_rank > kMostExperts)
    return fail(Code::kInvalidArgument, "%d ranks of %d experts each; at most %lld experts in all are allowed",
                wanted.num_ranks, wanted.experts_per_rank, Int(kMostExperts));
  if (wanted.num_bytes <= 0 || wanted.num_bytes % 128 != 0)
    return fail(Code::kInvalidArgument,
                "the buffer has %lld bytes; a positive multiple of 128 is needed (see the size hint)",
                Int(wanted.num_bytes));
  return {};
}

Result<void> check_arguments(const Dispatch& args, const Limits& limits) {
  const int payload = static_cast<int>(args.payload);
  if (payload < 0 || payload > kPayloadFp8Ue8m0)
    return fail(Code::kInvalidArgument, "payload is %d; 0 to %d are known", payload, kPayloadFp8Ue8m0);
  NIXL_TRY(check_shape(args.max_tokens, args.hidden, hidden_step(payload), args.num_ranks, limits));
  NIXL_TRY(check_selection(args));
  if (args.num_tokens > 0) NIXL_TRY(check_present("x", args.x));
  NIXL_TRY(check_memory(args));
  if (args.recv_weights && !args.topk_weights && args.num_tokens > 0)
    return fail(Code::kInvalidArgument, "recv_weights needs topk_weights, which is null");
  return {};
}

Result<void> check_arguments(const CombineArgs& args, const Limits& limits) {
  NIXL_TRY(check_shape(args.max_tokens, args.hidden, hidden_step(kPayloadBf16), args.num_ranks, limits));
  if (args.zero_copy && args.logfmt)
    return fail(Code::kInvalidArgument, "logfmt and zero_copy exclude each other; both are set");
  return check_memory(args);
}

Result<void> check_memory(const Dispatch& args) {
  NIXL_TRY(check_handle(args));
  NIXL_TRY(check_present("recv_x", args.recv_x));
  NIXL_TRY(check_present("recv_count", args.recv_count));
  if (args.payload != nixl::ep::Payload::kBf16) NIXL_TRY(check_present("recv_scales", args.recv_scales));
  return {};
}

Result<void> check_memory(const CombineArgs& args) {
  NIXL_TRY(check_selection(args));
  NIXL_TRY(check_handle(args));
  if (!args.zero_copy) NIXL_TRY(check_present("x", args.x));
  if (args.num_tokens > 0) {
    NIXL_TRY(check_present("topk_weights", args.topk_weights));
    NIXL_TRY(check_present("out", args.out));
  }
  return {};
}

Result<void> check_combine_buffer(std::int64_t max_tokens, std::int64_t hidden, int num_ranks, const Limits& limits) {
  return check_shape(max_tokens, hidden, hidden_step(kPayloadBf16), num_ranks, limits);
}

}  // namespace nixl::core::ep
