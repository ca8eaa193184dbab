// One rank's tensors of a case, and its calls.
#pragma once
#include "gpu_ranks.h"
#include "reference.h"

namespace gpu_test {

inline std::int64_t bytes_for(const Case& c) {
  return size_hint_bytes(c.max_tokens, c.hidden, std::int64_t{c.ranks} * c.experts);
}

struct Tensors {
  Case c;
  int rank;
  Device<std::uint16_t> x, y, out;
  Device<std::uint8_t> ids, recv_x, places, records;
  Device<float> weights, recv_weights;
  Device<std::uint32_t> scales;
  Device<std::int32_t> count, info, stats;
  Device<std::int64_t> range, cost;
  cudaStream_t stream = nullptr;

  Tensors(const Case& given, int own) : c(given), rank(own) {
    const int n = c.tokens(rank);
    const std::size_t rows = std::size_t(c.experts) * c.rows();
    std::vector<std::uint16_t> tokens;
    std::vector<std::uint8_t> id_bytes;
    std::vector<float> w;
    for (int t = 0; t < n; ++t) {
      const auto row = token_row(c, rank, t);
      tokens.insert(tokens.end(), row.begin(), row.end());
      const auto own_ids = token_ids(c, rank, t);
      for (int k = 0; k < c.topk; ++k) {
        const long long id = own_ids[k];
        const auto* raw = reinterpret_cast<const std::uint8_t*>(&id);
        id_bytes.insert(id_bytes.end(), raw, raw + c.index_bytes);
        w.push_back(token_weight(c, rank, t, k));
      }
    }
    x = Device<std::uint16_t>(tokens);
    ids = Device<std::uint8_t>(id_bytes);
    weights = Device<float>(w);
    out = Device<std::uint16_t>(std::size_t(c.max_tokens) * c.hidden);
    recv_x = Device<std::uint8_t>(rows * layout::row_bytes(c.payload, c.hidden));
    scales = Device<std::uint32_t>(rows * layout::scale_words(c.payload, c.hidden));
    places = Device<std::uint8_t>(rows);
    records = Device<std::uint8_t>(layout::make_record_layout(c.max_tokens, c.topk, c.ranks).total);
    records.fill(0xee);
    recv_weights = Device<float>(rows);
    count = Device<std::int32_t>(c.experts);
    info = Device<std::int32_t>(rows);
    stats = Device<std::int32_t>(c.experts);
    range = Device<std::int64_t>(std::size_t(c.experts) * c.ranks);
    cost = Device<std::int64_t>(c.ranks);
    y = Device<std::uint16_t>(rows * c.hidden);
    stats.fill(0);
    cost.fill(0);
    info.fill(0xee);
    out.fill(0xff);
    CUDA_OK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  }
  ~Tensors() { (void)cudaStreamDestroy(stream); }

  Dispatch dispatch() const {
    Dispatch d;
    d.x = x.get();
    d.num_tokens = c.tokens(rank);
    d.hidden = c.hidden;
    d.topk_idx = ids.get();
    d.topk = c.topk;
    d.index_bytes = c.index_bytes;
    d.topk_weights = c.weights ? weights.get() : nullptr;
    d.max_tokens = c.max_tokens;
    d.num_ranks = c.ranks;
    d.payload = static_cast<nixl::ep::Payload>(c.payload);
    d.recv_x = recv_x.get();
    d.recv_scales = scales.get();
    d.recv_count = count.get();
    d.src_info = info.get();
    d.layout_range = range.get();
    d.recv_weights = c.weights ? recv_weights.get() : nullptr;
    d.recv_places = places.get();
    d.records = records.get();
    d.recv_stats = stats.get();
    d.wait_cost = cost.get();
    d.stream = stream;
    return d;
  }
  CombineArgs combine() const {
    CombineArgs a;
    a.x = y.get();
    a.num_tokens = c.tokens(rank);
    a.hidden = c.hidden;
    a.topk_idx = ids.get();
    a.topk = c.topk;
    a.index_bytes = c.index_bytes;
    a.topk_weights = weights.get();
    a.src_info = info.get();
    a.layout_range = range.get();
    a.recv_weights = c.weights ? recv_weights.get() : nullptr;
    a.recv_places = places.get();
    a.records = records.get();
    a.max_tokens = c.max_tokens;
    a.num_ranks = c.ranks;
    a.zero_copy = c.zero_copy;
    a.sends_only = c.split;
    a.out = out.get();
    a.stream = stream;
    return a;
  }
  // Something finite where experts would have written: for timing, where sums are not looked at.
  void fill_answers() const {
    std::vector<std::uint16_t> block(1 << 20);
    for (std::size_t i = 0; i < block.size(); ++i)
      block[i] =
          layout::bf16_from_float((static_cast<int>(mix(rank, static_cast<std::uint32_t>(i)) % 2001) - 1000) * 1e-3f);
    for (std::size_t at = 0; at < y.size(); at += block.size())
      CUDA_OK(
          cudaMemcpy(y.get() + at, block.data(), 2 * std::min(block.size(), y.size() - at), cudaMemcpyHostToDevice));
  }
  void run_dispatch(Path& path) const {
    if (c.split) {
      OK(path.dispatch_send(dispatch()));
      OK(path.dispatch_recv(dispatch()));
    } else {
      OK(path.dispatch(dispatch()));
    }
  }
  void run_combine(Path& path) const {
    if (c.split) {
      OK(path.combine_send(combine()));
      OK(path.combine_recv(combine()));
    } else {
      OK(path.combine(combine()));
    }
  }
};

}  // namespace gpu_test
