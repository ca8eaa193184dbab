// Sorts the top-k ids of a call by expert: which tokens go where, in the order of route.h.
#pragma once
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "ep/cpu/exchange.h"
#include "ep/layout/route.h"

namespace nixl::core::ep {

// What was wrong with the values of an operation's tensors; kept until somebody asks. Thread-safe.
class InputErrors {
 public:
  [[gnu::format(printf, 2, 3)]] void report(const char* format, ...);
  std::string take();

 private:
  std::mutex mutex_;
  std::string first_;
};

// The ids of one call: [num_tokens, topk], int32 or int64.
struct TopkIds {
  const void* data = nullptr;
  std::int64_t num_tokens = 0;
  int topk = 0;
  int index_bytes = 8;

  std::int64_t at(std::int64_t i) const {
    return index_bytes == 4 ? static_cast<const std::int32_t*>(data)[i] : static_cast<const std::int64_t*>(data)[i];
  }
};

class TokenIndex {
 public:
  // Counts the entries of every expert of ranks that `exchange` reaches. Ids outside and rows beyond max_tokens of one
  // expert are left out and reported.
  void count(const TopkIds& ids, int num_ranks, int experts_per_rank, std::int64_t max_tokens, const Exchange& exchange,
             InputErrors& errors);
  std::int64_t num_experts() const { return static_cast<std::int64_t>(begin_.size()) - 1; }
  std::int64_t num_entries() const { return begin_.back(); }
  // begin int32 [num_experts + 1], entries [num_entries], out_weights [num_entries] where weights [n, K] are given.
  void write(std::int32_t* begin, Entry* entries, float* out_weights, const float* weights);
  // Whether a token goes anywhere; after write.
  bool sent(std::int64_t token) const { return sent_[static_cast<std::size_t>(token)] != 0; }

 private:
  TopkIds ids_;
  std::vector<std::int32_t> begin_;
  std::vector<std::int32_t> next_;
  std::vector<char> wanted_;  // by expert: of a rank that is reached
  std::vector<char> sent_;    // by token
};

}  // namespace nixl::core::ep
