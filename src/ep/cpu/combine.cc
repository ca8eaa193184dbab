#include "ep/cpu/combine.h"

#include <algorithm>
#include <cstring>

#include "ep/layout/route.h"

namespace nixl::core::ep {

namespace {

// Where the caller's rows lie: its tensor, or this exchange's slot.
struct Rows {
  const std::byte* base = nullptr;
  std::int64_t stride = 0;  // bytes
  std::int64_t rows = 0;    // T
  const std::byte* of(std::int64_t local, std::int64_t row) const { return base + (local * rows + row) * stride; }
};
std::int64_t zero_copy_bytes(const Setting& setting, const CombineArgs& args) {
  return align_up<std::int64_t>(
      setting.capacity.experts_per_rank * args.num_ranks * args.max_tokens * zero_copy_row_stride(args.hidden) * 2, 64);
}
// A caller's rows without copy lie at the head of the slot of the operation's first exchange.
Rows rows_of(const Setting& setting, const CombineArgs& args, int slot) {
  Rows rows;
  rows.rows = std::int64_t{args.num_ranks} * args.max_tokens;
  rows.base = args.zero_copy ? setting.own->slot(slot) : static_cast<const std::byte*>(args.x);
  rows.stride = 2 * (args.zero_copy ? zero_copy_row_stride(args.hidden) : args.hidden);
  return rows;
}

std::int64_t range_of(const CombineArgs& args, int local, int rank) {
  return args.layout_range[std::int64_t{local} * args.num_ranks + rank];
}

Message message_of(const Setting& setting, const CombineArgs& args, Staged staged) {
  Message message;
  message.staged = staged;
  message.num_tokens = args.num_tokens;
  message.hidden = args.hidden;
  message.max_tokens = args.max_tokens;
  message.num_ranks = args.num_ranks;
  message.experts_per_rank = setting.capacity.experts_per_rank;
  return message;
}

const char* name(Staged staged) {
  switch (staged) {
    case Staged::kRows:
      return "every row (exact sums)";
    case Staged::kWeights:
      return "weights (reduced sums)";
    case Staged::kPartials:
      return "partial sums (reduced sums)";
    case Staged::kNothing:
    case Staged::kTokens:
      break;
  }
  return "no combine";
}

// Whether a source's message belongs to this call; otherwise the source is masked and the reason reported.
bool fits(const Setting& setting, const CombineArgs& args, const Source& source, Staged staged) {
  const Message& m = source.message;
  if (m.staged == staged && m.num_ranks == args.num_ranks && m.hidden == args.hidden &&
      m.max_tokens == args.max_tokens && m.experts_per_rank == setting.capacity.experts_per_rank)
    return true;
  setting.errors->report(
      "rank %d sends %s for %d ranks, hidden %lld, max_tokens %lld in a combine in which this rank awaits %s for %d, %lld, "
      "%lld; it was masked. combine=, use of hooks and weights at dispatch must be the same on all ranks",
      source.rank, name(m.staged), m.num_ranks, static_cast<long long>(m.hidden), static_cast<long long>(m.max_tokens),
      name(staged), args.num_ranks, static_cast<long long>(args.hidden), static_cast<long long>(args.max_tokens));
  setting.exchange->reject(source);
  return false;
}

}  // namespace

const std::uint16_t* Combiner::Block::take(std::int32_t token) {
  while (next < count && tokens[next] < token) ++next;
  if (next == count || tokens[next] != token) return nullptr;
  return reinterpret_cast<const std::uint16_t*>(rows + stride * next++);
}

Combiner::Way Combiner::way_of(const CombineArgs& args) const {
  if (mode_ == nixl::ep::Combine::kExact) return Way::kExact;
  if (args.recv_weights) return Way::kReduced;
  return args.sends_only ? Way::kExact : Way::kReducedAsking;
}

Result<void> Combiner::send(const Setting& setting, const CombineArgs& args) {
  switch (way_of(args)) {
    case Way::kExact:
      return stage_rows(setting, args);
    case Way::kReducedAsking:
      return stage_weights(setting, args);
    case Way::kReduced:
      break;
  }
  list_items_known(setting, args);
  return stage_partials(setting, args);
}

Result<void> Combiner::recv(const Setting& setting, const CombineArgs& args) {
  Exchange& exchange = *setting.exchange;
  const Way way = way_of(args);
  if (way == Way::kReducedAsking) {
    exchange.gather(WaitSite::kCombineWeights, args.wait_cost);
    while (!list_items_asked(setting, args) || !exchange.verify()) {
    }
    exchange.begin_again();
    NIXL_TRY(stage_partials(setting, args));
  }
  exchange.gather(WaitSite::kCombineRows, args.wait_cost);
  do {
    while (!open_blocks(setting, args, way == Way::kExact ? setting.capacity.experts_per_rank : 1)) {
    }
    if (way == Way::kExact)
      sum_rows(setting, args);
    else
      sum_partial_rows(setting, args);
  } while (!exchange.verify());
  return {};
}

// Exact, sending side: a block of rows for every (owner, local expert), owners other than this rank itself.
Result<void> Combiner::stage_rows(const Setting& setting, const CombineArgs& args) {
  Exchange& exchange = *setting.exchange;
  const int experts_per_rank = setting.capacity.experts_per_rank;
  const auto range_for = [&](int owner, int local) -> std::int64_t {
    return owner == setting.rank || !exchange.reaches(owner) ? 0 : range_of(args, local, owner);
  };
  std::int64_t num_rows = 0;
  for (int owner = 0; owner < args.num_ranks; ++owner)
    for (int local = 0; local < experts_per_rank; ++local) num_rows += range_count(range_for(owner, local));
  const std::int64_t num_blocks = std::int64_t{args.num_ranks} * experts_per_rank;
  const CombineStage stage = make_combine_stage(num_blocks, num_rows, args.hidden, args.zero_copy);
  const Rows rows = rows_of(setting, args, exchange.slot());
  const std::int64_t stage_at = args.zero_copy ? zero_copy_bytes(setting, args) : 0;
  NIXL_ASSIGN(std::byte * base, exchange.stage(stage.total, stage_at));
  std::int32_t* begin = at<std::int32_t>(base, stage.begin);
  std::int64_t* first = at<std::int64_t>(base, stage.first);
  std::int32_t* tokens = at<std::int32_t>(base, stage.tokens);
  const std::int64_t slot_offset = setting.own->slot_offset(exchange.slot());
  std::int32_t row = 0;
  begin[0] = 0;
  for (std::int64_t block = 0; block < num_blocks; ++block) {
    const int owner = static_cast<int>(block / experts_per_rank);
    const int local = static_cast<int>(block % experts_per_rank);
    const std::int64_t range = range_for(owner, local);
    const std::int32_t count = range_count(range);
    const std::byte* from = rows.of(local, range_first(range));
    if (args.zero_copy) {
      first[block] = slot_offset + (from - rows.base);
    } else {
      first[block] = slot_offset + stage.rows + row * stage.row_stride;
      for (std::int32_t i = 0; i < count; ++i)
        copy_row(base + stage.rows + (row + i) * stage.row_stride, from + i * rows.stride, 2 * args.hidden);
    }
    std::copy_n(args.src_info + local * rows.rows + range_first(range), count, tokens + row);
    row += count;
    begin[block + 1] = row;
  }
  Message message = message_of(setting, args, Staged::kRows);
  message.num_entries = num_rows;
  message.row_stride = args.zero_copy ? rows.stride : stage.row_stride;
  message.rows_in_place = args.zero_copy;
  exchange.publish(message);
  return {};
}

// Reduced without weights at dispatch, first half: what the ranks of experts need to know of this rank's tokens.
Result<void> Combiner::stage_weights(const Setting& setting, const CombineArgs& args) {
  Exchange& exchange = *setting.exchange;
  const TopkIds ids{args.topk_idx, args.num_tokens, args.topk, args.index_bytes};
  index_.count(ids, args.num_ranks, setting.capacity.experts_per_rank, args.max_tokens, exchange, *setting.errors);
  const DispatchStage stage =
      make_dispatch_stage(index_.num_experts(), index_.num_entries(), 0, args.hidden, kPayloadBf16, true);
  NIXL_ASSIGN(std::byte * base, exchange.stage(stage.total, args.zero_copy ? zero_copy_bytes(setting, args) : 0));
  index_.write(at<std::int32_t>(base, stage.begin), at<Entry>(base, stage.entries), at<float>(base, stage.weights),
               args.topk_weights);
  first_slot_ = exchange.slot();
  Message message = message_of(setting, args, Staged::kWeights);
  message.num_entries = index_.num_entries();
  exchange.publish(message);
  return {};
}

void Combiner::list_items_known(const Setting& setting, const CombineArgs& args) {
  first_slot_ = setting.exchange->slot();
  const Rows rows = rows_of(setting, args, first_slot_);
  items_.clear();
  for (int owner = 0; owner < args.num_ranks; ++owner) {
    if (!setting.exchange->reaches(owner)) continue;
    for (int local = 0; local < setting.capacity.experts_per_rank; ++local) {
      const std::int64_t range = range_of(args, local, owner);
      for (std::int64_t row = range_first(range); row < range_first(range) + range_count(range); ++row) {
        const std::int64_t i = local * rows.rows + row;
        items_.push_back({owner,
                          make_entry(args.src_info[i], args.recv_places[i]),
                          {reinterpret_cast<const std::uint16_t*>(rows.of(local, row)), args.recv_weights[i]}});
      }
    }
  }
}

// The same from the weights that owners announced. False when a source had to be refused.
bool Combiner::list_items_asked(const Setting& setting, const CombineArgs& args) {
  Exchange& exchange = *setting.exchange;
  const int experts_per_rank = setting.capacity.experts_per_rank;
  const Rows rows = rows_of(setting, args, first_slot_);
  items_.clear();
  for (const Source& source : exchange.sources()) {
    if (!fits(setting, args, source, Staged::kWeights)) return false;
    const std::int64_t num_entries = source.message.num_entries;
    const DispatchStage stage = make_dispatch_stage(std::int64_t{args.num_ranks} * experts_per_rank, num_entries, 0,
                                                    args.hidden, kPayloadBf16, true);
    const std::byte* base = exchange.stage_of(source, stage.total);
    for (int local = 0; base && local < experts_per_rank; ++local) {
      const std::int32_t* begin =
          at<std::int32_t>(base, stage.begin) + std::int64_t{setting.rank} * experts_per_rank + local;
      std::int64_t entry = std::clamp<std::int64_t>(begin[0], 0, num_entries);
      const std::int64_t end = std::clamp<std::int64_t>(begin[1], entry, num_entries);
      const Entry* entries = at<Entry>(base, stage.entries);
      const float* weights = at<float>(base, stage.weights);
      const std::int64_t range = range_of(args, local, source.rank);
      for (std::int64_t row = range_first(range); row < range_first(range) + range_count(range); ++row) {
        const std::int32_t token = args.src_info[local * rows.rows + row];
        while (entry < end && token_of(entries[entry]) < token) ++entry;
        if (entry == end || token_of(entries[entry]) != token) continue;
        items_.push_back({source.rank,
                          entries[entry],
                          {reinterpret_cast<const std::uint16_t*>(rows.of(local, row)), weights[entry]}});
        ++entry;
      }
    }
  }
  return true;
}

// Reduced, sending side: one row for each token that this rank holds rows of.
Result<void> Combiner::stage_partials(const Setting& setting, const CombineArgs& args) {
  Exchange& exchange = *setting.exchange;
  const auto order = [](const Item& item) { return static_cast<std::uint64_t>(item.owner) << 32 | item.entry; };
  std::sort(items_.begin(), items_.end(), [&](const Item& a, const Item& b) { return order(a) < order(b); });
  const auto same_token = [](const Item& a, const Item& b) {
    return a.owner == b.owner && token_of(a.entry) == token_of(b.entry);
  };
  std::int64_t num_rows = 0;
  for (std::size_t i = 0; i < items_.size(); ++i) num_rows += i == 0 || !same_token(items_[i - 1], items_[i]);
  const CombineStage stage = make_combine_stage(args.num_ranks, num_rows, args.hidden, false);
  // The caller's rows, still to be read, may lie at the head of this very slot.
  const std::int64_t stage_at = args.zero_copy && exchange.slot() == first_slot_ ? zero_copy_bytes(setting, args) : 0;
  NIXL_ASSIGN(std::byte * base, exchange.stage(stage.total, stage_at));
  std::int32_t* begin = at<std::int32_t>(base, stage.begin);
  std::int64_t* first = at<std::int64_t>(base, stage.first);
  std::int32_t* tokens = at<std::int32_t>(base, stage.tokens);
  const std::int64_t rows_offset = setting.own->slot_offset(exchange.slot()) + stage_at + stage.rows;
  std::size_t item = 0;
  std::int32_t row = 0;
  for (int owner = 0; owner < args.num_ranks; ++owner) {
    begin[owner] = row;
    first[owner] = rows_offset + row * stage.row_stride;
    while (item < items_.size() && items_[item].owner == owner) {
      weighted_.clear();
      const Item& leader = items_[item];
      for (; item < items_.size() && same_token(leader, items_[item]); ++item) weighted_.push_back(items_[item].row);
      tokens[row] = token_of(leader.entry);
      sum_weighted(weighted_, args.hidden, at<std::uint16_t>(base, stage.rows + row * stage.row_stride));
      ++row;
    }
  }
  begin[args.num_ranks] = row;
  Message message = message_of(setting, args, Staged::kPartials);
  message.num_entries = num_rows;
  message.row_stride = stage.row_stride;
  exchange.publish(message);
  return {};
}

// Receiving side: finds the blocks that are this rank's in every source's stage; blocks_[rank * blocks_per_rank + i].
// False when a source had to be refused.
bool Combiner::open_blocks(const Setting& setting, const CombineArgs& args, int blocks_per_rank) {
  Exchange& exchange = *setting.exchange;
  const bool exact = way_of(args) == Way::kExact;
  const std::int64_t num_blocks = std::int64_t{args.num_ranks} * blocks_per_rank;
  blocks_.assign(static_cast<std::size_t>(num_blocks), Block{});
  for (const Source& source : exchange.sources()) {
    if (!fits(setting, args, source, exact ? Staged::kRows : Staged::kPartials)) return false;
    if (exact && !source.participant) continue;
    const Message& m = source.message;
    const CombineStage stage = make_combine_stage(num_blocks, m.num_entries, m.hidden, m.rows_in_place);
    const std::byte* base = exchange.stage_of(source, stage.total);
    if (!base) continue;
    const std::int32_t* begin = at<std::int32_t>(base, stage.begin) + std::int64_t{setting.rank} * blocks_per_rank;
    const std::int64_t* first = at<std::int64_t>(base, stage.first) + std::int64_t{setting.rank} * blocks_per_rank;
    for (int i = 0; i < blocks_per_rank; ++i) {
      const std::int64_t from = begin[i];
      const std::int64_t count = begin[i + 1] - from;
      if (count <= 0 || from < 0 || from + count > m.num_entries) continue;  // empty, or torn: verify() tells
      const std::byte* rows = exchange.memory_of(source, first[i], (count - 1) * m.row_stride + 2 * m.hidden);
      if (!rows) continue;
      blocks_[static_cast<std::size_t>(source.rank * blocks_per_rank + i)] =
          Block{at<std::int32_t>(base, stage.tokens) + from, static_cast<std::int32_t>(count), 0, rows, m.row_stride};
    }
  }
  if (exact) open_own_blocks(setting, args);
  return true;
}

// This rank's own rows are read where the caller has them.
void Combiner::open_own_blocks(const Setting& setting, const CombineArgs& args) {
  const int experts_per_rank = setting.capacity.experts_per_rank;
  const Rows rows = rows_of(setting, args, setting.exchange->slot());
  for (int local = 0; local < experts_per_rank; ++local) {
    const std::int64_t range = range_of(args, local, setting.rank);
    blocks_[static_cast<std::size_t>(setting.rank * experts_per_rank + local)] =
        Block{args.src_info + local * rows.rows + range_first(range), range_count(range), 0,
              rows.of(local, range_first(range)), rows.stride};
  }
}

void Combiner::sum_rows(const Setting& setting, const CombineArgs& args) {
  const TopkIds ids{args.topk_idx, args.num_tokens, args.topk, args.index_bytes};
  const auto experts = static_cast<std::int64_t>(blocks_.size());
  auto* out = static_cast<std::uint16_t*>(args.out);
  for (std::int64_t token = 0; token < args.num_tokens; ++token) {
    weighted_.clear();
    for (int place = 0; place < args.topk; ++place) {
      const std::int64_t id = ids.at(token * args.topk + place);
      const Lead lead = lead_of(id, experts);
      if (lead == Lead::kOutside)
        setting.errors->report("topk_idx[%lld, %d] is %lld; this combine has experts 0 to %lld; the entry was dropped",
                               static_cast<long long>(token), place, static_cast<long long>(id),
                               static_cast<long long>(experts - 1));
      if (lead != Lead::kExpert) continue;
      const std::uint16_t* row = blocks_[static_cast<std::size_t>(id)].take(static_cast<std::int32_t>(token));
      if (row) weighted_.push_back({row, args.topk_weights[token * args.topk + place]});
    }
    sum_weighted(weighted_, args.hidden, out + token * args.hidden);
  }
}

void Combiner::sum_partial_rows(const Setting& setting, const CombineArgs& args) {
  auto* out = static_cast<std::uint16_t*>(args.out);
  for (std::int64_t token = 0; token < args.num_tokens; ++token) {
    partials_.clear();
    for (const Source& source : setting.exchange->sources())
      if (const std::uint16_t* row =
              blocks_[static_cast<std::size_t>(source.rank)].take(static_cast<std::int32_t>(token)))
        partials_.push_back(row);
    sum_partials(partials_, args.hidden, out + token * args.hidden);
  }
}

Result<void> check_ranges(const Setting& setting, const CombineArgs& args) {
  const std::int64_t rows = std::int64_t{args.num_ranks} * args.max_tokens;
  for (int local = 0; local < setting.capacity.experts_per_rank; ++local) {
    for (int rank = 0; rank < args.num_ranks; ++rank) {
      const std::int64_t range = range_of(args, local, rank);
      if (!range_valid(range, rows, args.max_tokens))
        return fail(
            Code::kInvalidArgument,
            "layout_range[%d, %d] has rows %d to %lld; the tensor has %lld rows, one source at most %lld: pass the "
            "handle that dispatch returned",
            local, rank, range_first(range), static_cast<long long>(range_first(range)) + range_count(range),
            static_cast<long long>(rows), static_cast<long long>(args.max_tokens));
    }
  }
  return {};
}

}  // namespace nixl::core::ep
