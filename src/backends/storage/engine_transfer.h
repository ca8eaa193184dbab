// EngineTransfer: a prepared request of an engine as a Transfer. An Engine has start, poll, cancel and error_of for its
// Request, and a State of kIdle, kRunning, kDone and kFailed.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "contract/backend.h"

namespace nixl::core {

// `Place`: what the transfer keeps open, since a handle may be kept after its regions are gone.
template <typename Engine, typename Request, typename Place>
class EngineTransfer final : public Transfer {
 public:
  EngineTransfer(Engine& engine, std::unique_ptr<Request> request, std::vector<Place> places, std::string path)
      : engine_(engine), places_(std::move(places)), request_(std::move(request)), path_(std::move(path)) {}

  Result<TransferState> submit(std::optional<std::string_view>) override {
    NIXL_ASSIGN(const auto state, engine_.start(*request_));
    return told(state);
  }
  Result<TransferState> poll() override { return told(engine_.poll(*request_)); }
  bool cancel() noexcept override { return engine_.cancel(*request_); }
  std::string path() const override { return path_; }

 private:
  Result<TransferState> told(typename Engine::State state) const {
    switch (state) {
      case Engine::State::kRunning:
        return TransferState::kRunning;
      case Engine::State::kDone:
        return TransferState::kDone;
      case Engine::State::kFailed:
        return fail(Engine::error_of(*request_));
      case Engine::State::kIdle:
        break;
    }
    return fail(Code::kNotPosted, "the transfer was never submitted");
  }

  Engine& engine_;
  std::vector<Place> places_;
  std::unique_ptr<Request> request_;
  std::string path_;
};

template <typename Engine, typename Request, typename Place>
std::unique_ptr<Transfer> make_transfer(Engine& engine, std::unique_ptr<Request> request, std::vector<Place> places,
                                        std::string path) {
  return std::make_unique<EngineTransfer<Engine, Request, Place>>(engine, std::move(request), std::move(places),
                                                                  std::move(path));
}

}  // namespace nixl::core
