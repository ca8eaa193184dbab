#include "backends/ucx/shares.h"

#include <algorithm>

namespace nixl::core::ucx {
namespace {

constexpr std::uint64_t kLeastCut = 1 << 20;  // of a block that is divided
constexpr std::uint64_t kCutAt = 4096;

// The rest of the row that is being given out.
struct Rest {
  std::uint64_t local = 0, remote = 0, length = 0, count = 0;
};

class Sharing {
 public:
  explicit Sharing(const Plan& plan) : plan_(plan), runs_(plan.has_runs()) { load(); }

  bool at_end() const noexcept { return row_ >= plan_.num_rows(); }

  Plan take(std::uint64_t bytes) {
    Plan share;
    share.op = plan_.op;
    share.local_kind = plan_.local_kind;
    share.remote_kind = plan_.remote_kind;
    share.peer = plan_.peer;
    share.local_regions = plan_.local_regions;
    share.remote_regions = plan_.remote_regions;
    while (!at_end() && share.total_bytes < bytes) {
      const std::uint64_t left = bytes - share.total_bytes;
      if (rest_.length == 0 || rest_.count <= left / rest_.length) {
        give(share, rest_.length, rest_.count);
      } else if (rest_.length <= left) {
        give(share, rest_.length, left / rest_.length);
      } else {
        const std::uint64_t cut = (left + kCutAt - 1) / kCutAt * kCutAt;
        const bool divide = rest_.count == 1 && cut >= kLeastCut && cut + kLeastCut <= rest_.length;
        give(share, divide ? cut : rest_.length, 1);
        break;
      }
    }
    return share;
  }

 private:
  void load() {
    if (at_end()) return;
    rest_ = {plan_.local_address[row_], plan_.remote_address[row_], plan_.length[row_], runs_ ? plan_.count[row_] : 1};
  }

  // `count` blocks, or the beginning of the only one.
  void give(Plan& share, std::uint64_t length, std::uint64_t count) {
    const std::uint64_t local_stride = runs_ ? plan_.local_stride[row_] : 0;
    const std::uint64_t remote_stride = runs_ ? plan_.remote_stride[row_] : 0;
    share.local_address.push_back(rest_.local);
    share.remote_address.push_back(rest_.remote);
    share.length.push_back(length);
    share.local_region.push_back(plan_.local_region[row_]);
    share.remote_region.push_back(plan_.remote_region[row_]);
    if (runs_) {
      share.count.push_back(count);
      share.local_stride.push_back(local_stride);
      share.remote_stride.push_back(remote_stride);
    }
    share.num_blocks += count;
    share.total_bytes += count * length;
    if (length < rest_.length) {
      rest_.local += length;
      rest_.remote += length;
      rest_.length -= length;
    } else if (count < rest_.count) {
      rest_.local += count * local_stride;
      rest_.remote += count * remote_stride;
      rest_.count -= count;
    } else {
      ++row_;
      load();
    }
  }

  const Plan& plan_;
  const bool runs_;
  std::size_t row_ = 0;
  Rest rest_;
};

}  // namespace

std::vector<Plan> share_out(Plan plan, std::size_t parts) {
  std::vector<Plan> shares;
  Sharing sharing(plan);
  std::uint64_t left = plan.total_bytes;
  for (; parts > 1 && !sharing.at_end(); --parts) {
    Plan share = sharing.take(std::max<std::uint64_t>(1, left / parts));
    left -= share.total_bytes;
    shares.push_back(std::move(share));
  }
  if (!sharing.at_end()) shares.push_back(sharing.take(UINT64_MAX));
  return shares;
}

}  // namespace nixl::core::ucx
