// A backend built outside the tree: copies memory inside one agent. Compiled as libplugin_COPY.so it is backend "COPY".
#include <nixl/backend.h>

#include <cstring>

namespace {

class Copy final : public nixl::Backend {
 public:
  static constexpr bool kRemote = false, kLocal = true, kNotif = false;
  static constexpr const char* kVersion = "1.0";
  static std::string probe() { return {}; }
  static std::unordered_map<std::string, std::string> params() { return {{"limit_bytes", "0"}}; }
  static std::vector<nixl::MemType> mems() { return {nixl::MemType::DRAM}; }

  explicit Copy(const nixl::PluginInit& init) : limit_(std::stoull(init.params.at("limit_bytes"))) {}

  bool supportsLocal() const override { return kLocal; }
  bool supportsRemote() const override { return kRemote; }
  bool supportsNotif() const override { return kNotif; }
  std::vector<nixl::MemType> getSupportedMems() const override { return mems(); }

  void* connect(const std::string&, const std::string&) override { return this; }
  void disconnect(void*) override {}
  void* registerMemory(const nixl::PluginRegion& region) override {
    if (limit_ && region.len > limit_)
      throw std::length_error("a region of " + std::to_string(region.len) +
                              " bytes is above limit_bytes=" + std::to_string(limit_));
    return this;
  }
  void deregisterMemory(void*) override {}
  void* loadLocalMemory(void*, const nixl::PluginRegion&) override { return this; }

  void* prepareTransfer(bool write, void*, std::vector<nixl::PluginPiece> pieces) override {
    return new Job{write, std::move(pieces)};
  }
  nixl::PluginState postTransfer(void* transfer, const std::string*) override {
    const auto* job = static_cast<Job*>(transfer);
    for (const nixl::PluginPiece& piece : job->pieces) {
      auto* local = reinterpret_cast<void*>(piece.local_addr);
      auto* remote = reinterpret_cast<void*>(piece.remote_addr);
      std::memmove(job->write ? remote : local, job->write ? local : remote, piece.len);
    }
    return nixl::PluginState::Done;
  }
  nixl::PluginState checkTransfer(void*) override { return nixl::PluginState::Done; }
  bool cancelTransfer(void*) override { return true; }
  void releaseTransfer(void* transfer) override { delete static_cast<Job*>(transfer); }

 private:
  struct Job {
    bool write;
    std::vector<nixl::PluginPiece> pieces;
  };
  std::uint64_t limit_;
};

}  // namespace

NIXL_BACKEND_PLUGIN(Copy)
