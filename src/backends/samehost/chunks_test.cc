// How transfers are cut: every byte in one chunk, chunks within their bounds.
#include "backends/samehost/chunks.h"

#include <random>
#include <vector>

#include "backends/samehost/test_process.h"

using namespace nixl::core;
using samehost::test::at;

TEST(chunks_cover_every_byte_once) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 300; ++round) {
    Plan plan;
    const bool runs = round % 2;
    const int rows = 1 + static_cast<int>(random() % (runs || round % 4 ? 40 : 700));
    std::uint64_t next = 4096;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> wanted;  // local address, remote address of every byte's block
    for (int r = 0; r < rows; ++r) {
      const std::uint64_t length = std::vector<std::uint64_t>{0, 1, 7, 4096, 100'000, 3'000'000}[random() % 6];
      const std::uint64_t count = runs ? 1 + random() % 700 : 1, stride = length + random() % 3 * 64;
      plan.local_address.push_back(next);
      plan.remote_address.push_back(next + (1ull << 40));
      plan.length.push_back(length);
      plan.local_region.push_back(0);
      plan.remote_region.push_back(static_cast<std::uint32_t>(r));
      if (runs) {
        plan.count.push_back(count);
        plan.local_stride.push_back(stride);
        plan.remote_stride.push_back(stride);
      }
      plan.num_blocks += count;
      plan.total_bytes += count * length;
      for (std::uint64_t b = 0; b < count; ++b)
        if (length) wanted.push_back({next + b * stride, length});
      next += count * stride + random() % 2 * 64;
    }
    const auto starts = samehost::cut(plan);
    std::uint64_t total = 0;
    std::vector<std::pair<std::uint64_t, std::uint64_t>> seen;
    for (std::size_t c = 0; c + 1 < starts.size(); ++c) {
      samehost::Pieces pieces;
      samehost::gather(plan, starts[c], starts[c + 1], pieces);
      CHECK(pieces.count > 0 && pieces.count <= samehost::kMaxPieces && pieces.num_regions > 0);
      std::uint64_t bytes = 0;
      for (std::size_t i = 0; i < pieces.count; ++i) {
        CHECK_EQ(at(pieces.remote[i].iov_base), at(pieces.local[i].iov_base) + (1ull << 40));
        CHECK_EQ(pieces.local[i].iov_len, pieces.remote[i].iov_len);
        bytes += pieces.local[i].iov_len;
        const std::uint64_t from = at(pieces.local[i].iov_base);
        if (!seen.empty() && seen.back().first + seen.back().second == from)
          seen.back().second += pieces.local[i].iov_len;
        else
          seen.push_back({from, pieces.local[i].iov_len});
      }
      CHECK(bytes <= samehost::kMaxChunkBytes);
      total += bytes;
    }
    CHECK_EQ(total, plan.total_bytes);
    std::vector<std::pair<std::uint64_t, std::uint64_t>> joined;
    for (const auto& [from, length] : wanted)
      if (!joined.empty() && joined.back().first + joined.back().second == from)
        joined.back().second += length;
      else
        joined.push_back({from, length});
    CHECK(joined == seen);
  }
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
