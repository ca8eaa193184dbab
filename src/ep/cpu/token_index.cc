#include "ep/cpu/token_index.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <utility>

namespace nixl::core::ep {

void InputErrors::report(const char* format, ...) {
  std::lock_guard lock(mutex_);
  if (!first_.empty()) return;
  char text[400];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof(text), format, args);
  va_end(args);
  first_ = text;
}

std::string InputErrors::take() {
  std::lock_guard lock(mutex_);
  return std::exchange(first_, {});
}

void TokenIndex::count(const TopkIds& ids, int num_ranks, int experts_per_rank, std::int64_t max_tokens,
                       const Exchange& exchange, InputErrors& errors) {
  ids_ = ids;
  const std::int64_t experts = std::int64_t{num_ranks} * experts_per_rank;
  wanted_.resize(static_cast<std::size_t>(experts));
  for (int rank = 0; rank < num_ranks; ++rank)
    std::fill_n(wanted_.begin() + std::ptrdiff_t{rank} * experts_per_rank, experts_per_rank, exchange.reaches(rank));
  begin_.assign(static_cast<std::size_t>(experts) + 1, 0);
  std::int32_t* counts = begin_.data() + 1;
  for (std::int64_t i = 0; i < ids.num_tokens * ids.topk; ++i) {
    const std::int64_t id = ids.at(i);
    const Lead lead = lead_of(id, experts);
    if (lead == Lead::kOutside)
      errors.report(
          "topk_idx[%lld, %lld] is %lld; this call has experts 0 to %lld (%d ranks of %d); the entry was dropped",
          static_cast<long long>(i / ids.topk), static_cast<long long>(i % ids.topk), static_cast<long long>(id),
          static_cast<long long>(experts - 1), num_ranks, experts_per_rank);
    if (lead != Lead::kExpert || !wanted_[static_cast<std::size_t>(id)]) continue;
    if (counts[id] == max_tokens)
      errors.report(
          "expert %lld is selected more than %lld times by this rank, its bound of rows for one expert "
          "(num_max_dispatch_tokens_per_rank); the rows beyond were dropped",
          static_cast<long long>(id), static_cast<long long>(max_tokens));
    else
      ++counts[id];
  }
  for (std::int64_t expert = 0; expert < experts; ++expert) counts[expert] += counts[expert - 1];
}

void TokenIndex::write(std::int32_t* begin, Entry* entries, float* out_weights, const float* weights) {
  std::copy(begin_.begin(), begin_.end(), begin);
  next_ = begin_;
  sent_.assign(static_cast<std::size_t>(ids_.num_tokens), 0);
  const std::int64_t experts = num_experts();
  for (std::int64_t token = 0; token < ids_.num_tokens; ++token) {
    for (int place = 0; place < ids_.topk; ++place) {
      const std::int64_t id = ids_.at(token * ids_.topk + place);
      if (lead_of(id, experts) != Lead::kExpert || next_[id] == begin_[id + 1]) continue;
      const std::int32_t at = next_[id]++;
      entries[at] = make_entry(token, place);
      if (out_weights) out_weights[at] = weights[token * ids_.topk + place];
      sent_[static_cast<std::size_t>(token)] = 1;
    }
  }
}

}  // namespace nixl::core::ep
