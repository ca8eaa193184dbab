#include "backends/samehost/chunks.h"

#include <algorithm>

namespace nixl::core::samehost {
namespace {

std::uint64_t blocks_of(const Plan& plan, std::size_t row) noexcept {
  return plan.has_runs() ? plan.count[row] : 1;
}

void add(Pieces& out, std::uint64_t local, std::uint64_t remote, std::uint64_t bytes) noexcept {
  if (out.count > 0) {
    iovec &last_local = out.local[out.count - 1], &last_remote = out.remote[out.count - 1];
    if (reinterpret_cast<std::uint64_t>(last_local.iov_base) + last_local.iov_len == local &&
        reinterpret_cast<std::uint64_t>(last_remote.iov_base) + last_remote.iov_len == remote) {
      last_local.iov_len += bytes;
      last_remote.iov_len += bytes;
      return;
    }
  }
  out.local[out.count] = {reinterpret_cast<void*>(local), bytes};
  out.remote[out.count] = {reinterpret_cast<void*>(remote), bytes};
  ++out.count;
}

}  // namespace

std::vector<Position> cut(const Plan& plan) {
  std::vector<Position> starts;
  starts.reserve(plan.num_blocks / kMaxPieces + plan.total_bytes / kMaxChunkBytes + 2);
  std::uint64_t pieces = kMaxPieces,
                bytes = kMaxChunkBytes;  // used in the current chunk: full, so that the first row opens one
  const std::size_t rows = plan.num_rows();
  const bool runs = plan.has_runs();
  for (std::size_t row = 0; row < rows; ++row) {
    // What fits as it is, in a loop that a hundred thousand rows take: the rest of this function is for the others.
    for (; !runs && row < rows && pieces < kMaxPieces && plan.length[row] <= kMaxChunkBytes - bytes; ++row) {
      pieces += plan.length[row] != 0;
      bytes += plan.length[row];
    }
    if (row == rows) break;
    const std::uint64_t length = plan.length[row], blocks = blocks_of(plan, row);
    if (length == 0) continue;
    for (std::uint64_t block = 0, offset = 0; block < blocks;) {
      if (pieces >= kMaxPieces || bytes >= kMaxChunkBytes) {
        starts.push_back({row, block, offset});
        pieces = bytes = 0;
      }
      const std::uint64_t left = kMaxChunkBytes - bytes;
      if (offset == 0 && length <= left) {
        // One block fits; how many of a run do takes a division, which plain rows need not pay.
        const std::uint64_t taken = blocks == 1 ? 1 : std::min({blocks - block, kMaxPieces - pieces, left / length});
        block += taken;
        pieces += taken;
        bytes += taken * length;
        continue;
      }
      const std::uint64_t part = std::min(length - offset, left);
      ++pieces;
      bytes += part;
      offset += part;
      if (offset == length) {
        offset = 0;
        ++block;
      }
    }
  }
  if (!starts.empty()) starts.push_back({plan.num_rows(), 0, 0});
  return starts;
}

void gather(const Plan& plan, Position from, Position to, Pieces& out, const std::uint64_t* deltas) noexcept {
  out.count = out.num_regions = 0;
  const bool runs = plan.has_runs();
  for (std::size_t row = from.row; row < plan.num_rows() && row <= to.row; ++row) {
    const std::uint64_t first = row == from.row ? from.block : 0;
    const std::uint64_t last = row == to.row ? to.block : blocks_of(plan, row);  // exclusive
    const std::uint64_t length = plan.length[row];
    const bool ends_inside = row == to.row && to.offset > 0;
    if (length == 0 || (first >= last && !ends_inside)) continue;
    if (out.num_regions == 0 || out.regions[out.num_regions - 1] != plan.remote_region[row])
      out.regions[out.num_regions++] = plan.remote_region[row];
    const std::uint64_t delta = deltas ? deltas[plan.remote_region[row]] : 0;
    for (std::uint64_t block = first; block < last + ends_inside; ++block) {
      const std::uint64_t begin = row == from.row && block == from.block ? from.offset : 0;
      const std::uint64_t end = ends_inside && block == last ? to.offset : length;
      const std::uint64_t local_step = runs ? block * plan.local_stride[row] : 0;
      const std::uint64_t remote_step = runs ? block * plan.remote_stride[row] : 0;
      add(out, plan.local_address[row] + local_step + begin, plan.remote_address[row] + delta + remote_step + begin,
          end - begin);
    }
  }
}

}  // namespace nixl::core::samehost
