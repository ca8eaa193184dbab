// Opens a rank of a case and compares what it got with plain loops (reference.h).
#pragma once
#include "bodies.h"

namespace gpu_test {

inline void check_dispatch(const Tensors& t, const std::vector<bool>& absent, int times) {
  const Case& c = t.c;
  const auto rows = expected_rows(c, t.rank);
  const auto count = t.count.download();
  const auto stats = t.stats.download();
  const auto range = t.range.download();
  const auto info = t.info.download();
  const auto places = t.places.download();
  const auto weights = t.recv_weights.download();
  const auto scales = t.scales.download();
  const std::size_t bytes = layout::row_bytes(c.payload, c.hidden), words = layout::scale_words(c.payload, c.hidden);
  for (int expert = 0; expert < c.experts; ++expert) {
    int row = 0;
    std::vector<int> of(c.ranks, 0), first(c.ranks, 0);
    std::vector<Row> present;
    for (const Row& r : rows[expert])
      if (!absent[r.source]) present.push_back(r);
    CHECK_EQ(count[expert], static_cast<int>(present.size()));
    if (times > 0) CHECK_EQ(stats[expert], times * static_cast<int>(present.size()));
    const auto got = t.recv_x.download(std::size_t(expert) * c.rows() * bytes, present.size() * bytes);
    for (const Row& r : present) {
      const std::size_t at = std::size_t(expert) * c.rows() + row;
      CHECK_EQ(info[at], r.token);
      CHECK_EQ(int(places[at]), r.place);
      if (c.weights) CHECK_EQ(weights[at], token_weight(c, r.source, r.token, r.place));
      const Quantized want = quantized(c, token_row(c, r.source, r.token));
      if (std::memcmp(got.data() + row * bytes, want.bytes.data(), bytes) != 0) {
        std::size_t i = 0;
        while (got[row * bytes + i] == want.bytes[i]) ++i;
        std::fprintf(stderr, "%s rank %d expert %d row %d (source %d token %d): byte %zu is %02x, %02x expected\n",
                     c.name, t.rank, expert, row, r.source, r.token, i, got[row * bytes + i], want.bytes[i]);
        CHECK(false);
      }
      for (std::size_t w = 0; w < words; ++w)
        CHECK_EQ(scales[(std::size_t(expert) * words + w) * c.rows() + row], want.scales[w]);
      if (of[r.source]++ == 0) first[r.source] = row;
      ++row;
    }
    for (int source = 0; source < c.ranks; ++source) {
      CHECK_EQ(int(range[std::size_t(expert) * c.ranks + source] & 0xffffffff), of[source]);
      if (of[source]) CHECK_EQ(int(range[std::size_t(expert) * c.ranks + source] >> 32), first[source]);
    }
    if (times > 0 && row < c.rows())
      CHECK_EQ(static_cast<unsigned>(info[std::size_t(expert) * c.rows() + row]), 0xeeeeeeeeu);
  }
}

// Fills y with the experts' rows.
inline void fill_rows(Path& path, const Tensors& t) {
  const Case& c = t.c;
  std::uint16_t* base = t.y.get();
  std::int64_t stride = c.hidden, block = std::int64_t{c.rows()} * c.hidden;
  if (c.zero_copy) {
    const View view = OK(path.next_combine_buffer(c.max_tokens, c.hidden, c.ranks));
    base = static_cast<std::uint16_t*>(view.data);
    block = view.stride[0];
    stride = view.stride[1];
  } else {
    fill(base, 0xff, t.y.size() * 2);  // NaN where no row is
  }
  const auto rows = expected_rows(c, t.rank);
  std::vector<std::uint16_t> host;
  for (int expert = 0; expert < c.experts; ++expert) {
    host.assign(rows[expert].size() * stride, 0);
    for (std::size_t i = 0; i < rows[expert].size(); ++i)
      expert_row(c, t.rank * c.experts + expert, rows[expert][i].source, rows[expert][i].token, rows[expert][i].place,
                 host.data() + i * stride);
    CUDA_OK(cudaMemcpy(base + expert * block, host.data(), host.size() * 2, cudaMemcpyHostToDevice));
  }
}
inline void check_combine(const Tensors& t, const std::vector<bool>& absent) {
  const Case& c = t.c;
  const auto out = t.out.download();
  const bool exact = c.exact || (c.split && !c.weights);
  const auto present = delivered(c, t.rank);
  for (int token = 0; token < c.tokens(t.rank); ++token) {
    const auto want = combined(c, t.rank, token, exact, absent, present);
    for (int i = 0; i < c.hidden; ++i) {
      if (out[std::size_t(token) * c.hidden + i] == want[i]) continue;
      std::fprintf(stderr, "%s rank %d token %d channel %d: %04x, %04x expected\n", c.name, t.rank, token, i,
                   out[std::size_t(token) * c.hidden + i], want[i]);
      CHECK(false);
    }
  }
}

inline std::unique_ptr<Path> open_rank(Mesh& mesh, const Case& c, std::uint32_t incarnation, Nanoseconds timeout) {
  PathOptions options;
  options.rank = mesh.rank();
  options.combine = c.exact ? nixl::ep::Combine::kExact : nixl::ep::Combine::kReduced;
  options.timeout_ns = timeout;
  options.incarnation = incarnation;
  if (const char* blocks = std::getenv("EP_TEST_BLOCKS")) options.max_blocks = std::atoi(blocks);
  auto path = OK(open_cuda_path(options));
  OK(path->reserve({c.ranks, c.experts, bytes_for(c)}));
  return path;
}
inline void no_faults(Path& path, const char* where) {
  for (const Fault& fault : path.take_faults()) {
    std::fprintf(stderr, "%s: fault of rank %d, operation %llu, phase %d, expected %llx, seen %llx\n", where,
                 fault.rank, static_cast<unsigned long long>(fault.operation), static_cast<int>(fault.phase),
                 static_cast<unsigned long long>(fault.expected), static_cast<unsigned long long>(fault.seen));
    CHECK(false);
  }
}

}  // namespace gpu_test
