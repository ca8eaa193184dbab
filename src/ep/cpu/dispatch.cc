#include "ep/cpu/dispatch.h"

#include <algorithm>
#include <cstring>

#include "ep/cpu/rows.h"

namespace nixl::core::ep {

namespace {

static_assert(static_cast<int>(nixl::ep::Payload::kBf16) == kPayloadBf16);
static_assert(static_cast<int>(nixl::ep::Payload::kFp8) == kPayloadFp8);
static_assert(static_cast<int>(nixl::ep::Payload::kFp8Pow2) == kPayloadFp8Pow2);
static_assert(static_cast<int>(nixl::ep::Payload::kFp8Ue8m0) == kPayloadFp8Ue8m0);

}  // namespace

Result<void> Dispatcher::send(const Setting& setting, const Dispatch& args) {
  Exchange& exchange = *setting.exchange;
  const int payload = static_cast<int>(args.payload);
  const int experts_per_rank = setting.capacity.experts_per_rank;
  const TopkIds ids{args.topk_idx, args.num_tokens, args.topk, args.index_bytes};
  index_.count(ids, args.num_ranks, experts_per_rank, args.max_tokens, exchange, *setting.errors);
  const DispatchStage stage = make_dispatch_stage(index_.num_experts(), index_.num_entries(), args.num_tokens,
                                                  args.hidden, payload, args.topk_weights != nullptr);
  NIXL_ASSIGN(std::byte * base, exchange.stage(stage.total));
  index_.write(at<std::int32_t>(base, stage.begin), at<Entry>(base, stage.entries),
               args.topk_weights ? at<float>(base, stage.weights) : nullptr, args.topk_weights);
  const auto* x = static_cast<const std::uint16_t*>(args.x);
  const std::int64_t words = scale_words(payload, args.hidden);
  for (std::int64_t token = 0; token < args.num_tokens; ++token) {
    if (!index_.sent(token)) continue;
    std::byte* row = base + stage.rows + token * stage.row_stride;
    if (payload == kPayloadBf16)
      copy_row(row, x + token * args.hidden, row_bytes(payload, args.hidden));
    else
      quantize_row(x + token * args.hidden, args.hidden, payload, reinterpret_cast<std::uint8_t*>(row),
                   at<std::uint32_t>(base, stage.scales) + token * words);
  }
  Message message;
  message.staged = Staged::kTokens;
  message.num_entries = index_.num_entries();
  message.num_tokens = args.num_tokens;
  message.hidden = args.hidden;
  message.max_tokens = args.max_tokens;
  message.num_ranks = args.num_ranks;
  message.experts_per_rank = experts_per_rank;
  message.payload = payload;
  message.with_weights = args.topk_weights != nullptr;
  exchange.publish(message);
  return {};
}

// Finds this rank's part in every source's stage. False when a source had to be refused: look at the sources again.
bool Dispatcher::open_parts(const Setting& setting, const Dispatch& args) {
  Exchange& exchange = *setting.exchange;
  const int experts_per_rank = setting.capacity.experts_per_rank;
  const std::size_t window = static_cast<std::size_t>(experts_per_rank) + 1;
  parts_.clear();
  windows_.resize(exchange.sources().size() * window);
  for (const Source& source : exchange.sources()) {
    const Message& m = source.message;
    const auto refuse = [&](const char* what, std::int64_t theirs, std::int64_t ours) {
      setting.errors->report("rank %d dispatched with %s %lld, this rank with %lld; it was masked", source.rank, what,
                             static_cast<long long>(theirs), static_cast<long long>(ours));
      exchange.reject(source);
      return false;
    };
    const int payload = static_cast<int>(args.payload);
    if (m.staged != Staged::kTokens) return refuse("operation kind", static_cast<int>(m.staged), 1);
    if (m.num_ranks != args.num_ranks) return refuse("num_ranks", m.num_ranks, args.num_ranks);
    if (m.experts_per_rank != experts_per_rank) return refuse("experts per rank", m.experts_per_rank, experts_per_rank);
    if (m.hidden != args.hidden) return refuse("hidden", m.hidden, args.hidden);
    if (m.max_tokens != args.max_tokens) return refuse("max_tokens", m.max_tokens, args.max_tokens);
    if (m.payload != payload) return refuse("payload", m.payload, payload);
    if (args.recv_weights && !m.with_weights && m.num_entries > 0) return refuse("topk_weights", 0, 1);
    Part part;
    part.rank = source.rank;
    part.num_tokens = m.num_tokens;
    part.stage = make_dispatch_stage(std::int64_t{m.num_ranks} * experts_per_rank, m.num_entries, m.num_tokens,
                                     m.hidden, payload, m.with_weights);
    part.base = exchange.stage_of(source, part.stage.total);
    if (!part.base) return refuse("bytes beyond its memory", part.stage.total, 0);
    std::int32_t* begin = windows_.data() + parts_.size() * window;
    std::memcpy(begin, at<std::int32_t>(part.base, part.stage.begin) + std::int64_t{setting.rank} * experts_per_rank,
                window * sizeof(std::int32_t));
    part.begin = begin;
    // A stage that is being overwritten can say anything; verify() will tell, but it must not lead astray before that.
    bool sane =
        begin[0] >= 0 && begin[experts_per_rank] <= m.num_entries && (m.num_tokens > 0 || begin[experts_per_rank] == 0);
    for (int local = 0; local < experts_per_rank; ++local)
      sane = sane && begin[local] <= begin[local + 1] && begin[local + 1] - begin[local] <= args.max_tokens;
    if (!sane) {  // its sender has masked this rank: a fault, and no error of this caller
      exchange.reject(source);
      return false;
    }
    parts_.push_back(part);
  }
  return true;
}

void Dispatcher::place_block(const Dispatch& args, const Part& part, int local, std::int64_t first_row) const {
  const int payload = static_cast<int>(args.payload);
  const std::int64_t rows = std::int64_t{args.num_ranks} * args.max_tokens;  // T
  const std::int64_t bytes = row_bytes(payload, args.hidden);
  const std::int64_t words = scale_words(payload, args.hidden);
  const std::int32_t begin = part.begin[local];
  const std::int32_t count = part.begin[local + 1] - begin;
  const Entry* entries = at<Entry>(part.base, part.stage.entries) + begin;
  const std::int64_t out_row = local * rows + first_row;
  auto* out = static_cast<std::byte*>(args.recv_x) + out_row * bytes;
  std::int32_t* info = args.src_info + out_row;
  for (std::int32_t i = 0; i < count; ++i) {
    const std::int64_t token = std::min<std::int64_t>(token_of(entries[i]), part.num_tokens - 1);
    info[i] = static_cast<std::int32_t>(token);
    copy_row(out + i * bytes, part.base + part.stage.rows + token * part.stage.row_stride, bytes);
  }
  // Scales lie with the row index innermost: word by word, a run of rows at a time.
  const auto* scales = at<std::uint32_t>(part.base, part.stage.scales);
  for (std::int64_t word = 0; word < words; ++word) {
    std::uint32_t* column = static_cast<std::uint32_t*>(args.recv_scales) + (local * words + word) * rows + first_row;
    for (std::int32_t i = 0; i < count; ++i) column[i] = scales[info[i] * words + word];
  }
  if (args.recv_weights)
    std::memcpy(args.recv_weights + out_row, at<float>(part.base, part.stage.weights) + begin,
                static_cast<std::size_t>(count) * sizeof(float));
  if (!args.recv_places) return;
  for (std::int32_t i = 0; i < count; ++i)
    args.recv_places[out_row + i] = static_cast<std::uint8_t>(place_of(entries[i]));
}

void Dispatcher::place(const Dispatch& args, int experts_per_rank) {
  std::fill_n(args.layout_range, std::int64_t{experts_per_rank} * args.num_ranks, 0);
  for (int local = 0; local < experts_per_rank; ++local) {
    std::int64_t row = 0;
    for (const Part& part : parts_) {
      const std::int32_t count = part.begin[local + 1] - part.begin[local];
      args.layout_range[std::int64_t{local} * args.num_ranks + part.rank] = make_range(row, count);
      if (count > 0) place_block(args, part, local, row);
      row += count;
    }
    args.recv_count[local] = static_cast<std::int32_t>(row);
  }
}

Result<void> Dispatcher::recv(const Setting& setting, const Dispatch& args) {
  Exchange& exchange = *setting.exchange;
  const int experts_per_rank = setting.capacity.experts_per_rank;
  exchange.gather(WaitSite::kDispatch, args.wait_cost);
  // Every rank that fails in here is masked, so this ends.
  do {
    while (!open_parts(setting, args)) {
    }
    place(args, experts_per_rank);
  } while (!exchange.verify());
  if (args.recv_stats)
    for (int local = 0; local < experts_per_rank; ++local) args.recv_stats[local] += args.recv_count[local];
  return {};
}

}  // namespace nixl::core::ep
