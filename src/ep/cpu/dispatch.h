// Dispatch on the CPU path: tokens staged once at their source, pulled and spread over experts at their destination.
#pragma once
#include <vector>

#include "ep/cpu/exchange.h"
#include "ep/cpu/token_index.h"

namespace nixl::core::ep {

// What operations need to know of their path.
struct Setting {
  int rank = 0;
  Capacity capacity;
  OwnMemory* own = nullptr;
  Exchange* exchange = nullptr;
  InputErrors* errors = nullptr;
};

class Dispatcher {
 public:
  // Stages and announces; never waits.
  Result<void> send(const Setting& setting, const Dispatch& args);
  // Waits for all sources and fills the outputs.
  Result<void> recv(const Setting& setting, const Dispatch& args);

 private:
  // One source's part for this rank: begin of each local expert in its entries, and its rows.
  struct Part {
    int rank = -1;
    const std::byte* base = nullptr;
    DispatchStage stage;
    std::int64_t num_tokens = 0;
    const std::int32_t* begin = nullptr;  // in windows_, [L + 1]
  };
  bool open_parts(const Setting& setting, const Dispatch& args);
  void place(const Dispatch& args, int experts_per_rank);
  void place_block(const Dispatch& args, const Part& part, int local, std::int64_t first_row) const;

  TokenIndex index_;
  std::vector<Part> parts_;
  std::vector<std::int32_t> windows_;
};

}  // namespace nixl::core::ep
