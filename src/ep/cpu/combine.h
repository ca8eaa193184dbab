// Combine on the CPU path. Exact: the rank of an expert stages rows for the owners of the tokens, which pull and sum
// them. Reduced: it stages one row a token, the sum of its own; the weights it needs came with the dispatch or are
// asked from the owners in an exchange before.
#pragma once
#include <cstdint>
#include <vector>

#include "ep/cpu/dispatch.h"
#include "ep/cpu/rows.h"

namespace nixl::core::ep {

// Refuses a handle whose ranges lie outside its tensors, before anything is touched.
Result<void> check_ranges(const Setting& setting, const CombineArgs& args);

class Combiner {
 public:
  explicit Combiner(nixl::ep::Combine mode) : mode_(mode) {}
  Result<void> send(const Setting& setting, const CombineArgs& args);
  Result<void> recv(const Setting& setting, const CombineArgs& args);

 private:
  enum class Way { kExact, kReduced, kReducedAsking };
  Way way_of(const CombineArgs& args) const;

  // Rows of one (rank, local expert), or of one rank, as their owner reads them.
  struct Block {
    const std::int32_t* tokens = nullptr;  // ascending
    std::int32_t count = 0;
    std::int32_t next = 0;
    const std::byte* rows = nullptr;
    std::int64_t stride = 0;
    const std::uint16_t* take(std::int32_t token);  // the next row of this token, or null
  };
  // One row that this rank holds for somebody's token.
  struct Item {
    std::int32_t owner = 0;
    Entry entry = 0;
    WeightedRow row;
  };

  Result<void> stage_rows(const Setting& setting, const CombineArgs& args);
  Result<void> stage_weights(const Setting& setting, const CombineArgs& args);
  Result<void> stage_partials(const Setting& setting, const CombineArgs& args);
  void list_items_known(const Setting& setting, const CombineArgs& args);
  bool list_items_asked(const Setting& setting, const CombineArgs& args);
  bool open_blocks(const Setting& setting, const CombineArgs& args, int blocks_per_rank);
  void open_own_blocks(const Setting& setting, const CombineArgs& args);
  void sum_rows(const Setting& setting, const CombineArgs& args);
  void sum_partial_rows(const Setting& setting, const CombineArgs& args);

  const nixl::ep::Combine mode_;
  TokenIndex index_;
  int first_slot_ = 0;  // of the operation's first exchange
  std::vector<Item> items_;
  std::vector<Block> blocks_;
  std::vector<std::int32_t> windows_;
  std::vector<WeightedRow> weighted_;
  std::vector<const std::uint16_t*> partials_;
};

}  // namespace nixl::core::ep
