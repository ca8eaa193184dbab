// Answers a peer's read requests: checks every piece against our exposed regions, puts it into the asker's memory,
// flushes and reports. One object a request.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "backends/ucx/link.h"
#include "backends/ucx/regions.h"

namespace nixl::core::ucx {

class ReadService final : public Job {
 public:
  // `bytes` is the encoded request, already known to decode. `link` leads to the asker.
  ReadService(std::string bytes, Link& link, const ExposedTable& exposed);
  ~ReadService() override;
  void start_locked();
  bool ended() const noexcept { return ended_; }
  Link& link() const noexcept { return *link_; }

  bool advance_locked() override;
  void completed_locked(ucs_status_t status) override;
  void link_up_locked() override {}
  void link_down_locked() override {}
  void link_lost_locked(const Error& why) override;
  void abandon_locked() override;

 private:
  Result<void> prepare_locked();
  Result<void> issue_locked();
  void end_locked();

  const std::string bytes_;
  Link* const link_;
  const ExposedTable* const exposed_;
  ReadRequest request_;
  std::vector<std::shared_ptr<Exposed>> regions_;  // by piece
  std::vector<ucp_rkey_h> keys_;
  std::size_t next_ = 0;
  int in_flight_ = 0;
  bool flushed_ = false, ended_ = false, link_gone_ = false, abandoned_ = false;
  Result<void> outcome_;
};

}  // namespace nixl::core::ucx
