// GPU memory on the same-host path: exported by its owner, mapped once by a peer, and moved by one kernel for a whole
// list. Where this build or machine has no CUDA, open() says so; nothing else of this file is used then.
#pragma once
#include <memory>
#include <string>
#include <string_view>

#include "backends/samehost/peer.h"
#include "backends/samehost/transfer.h"
#include "base/result.h"
#include "contract/backend.h"

namespace nixl::core::samehost {

// One of our GPU regions: keeps its allocation exported while it lives.
class VramExport {
 public:
  virtual ~VramExport() = default;
  virtual std::string key() const = 0;
  virtual int device() const noexcept = 0;
};

// A peer's GPU region, mapped into this process.
class VramMapping {
 public:
  virtual ~VramMapping() = default;
};

class Vram {
 public:
  virtual ~Vram() = default;
  // Is there any point in open()? Loads no driver and initialises no device; the reason says what is missing.
  static Result<void> probe();
  static Result<std::unique_ptr<Vram>> open(std::shared_ptr<Mailbox> mailbox);

  // kUnsupported: this memory cannot be given to another process (the reason says why).
  virtual Result<std::unique_ptr<VramExport>> export_region(const Region& region) = 0;
  virtual Result<std::unique_ptr<VramMapping>> map_region(PeerProcess& peer, const Region& region,
                                                          std::string_view key) = 0;
  // A plan with VRAM on one side or on both.
  virtual Result<std::unique_ptr<Transfer>> prepare(Plan plan, std::shared_ptr<CopyThreads> threads) = 0;
  // Ends what the device has finished; true when something ended.
  virtual bool progress() noexcept = 0;
  // Something is on the device: progress() is needed until it ends.
  virtual bool busy() const noexcept = 0;
};

}  // namespace nixl::core::samehost
