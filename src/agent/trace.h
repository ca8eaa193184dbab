// What a profiler is told of an agent: when each transfer runs, and the calls that make it ready. Off, it costs a comparison.
#pragma once
#include <cstdint>
#include <string>

namespace nixl::core {

class Settings;

// Lives as long as the process. Called from any thread.
class Tracer {
 public:
  // A range that any thread may end; 0: nobody listens. `bytes` is shown with it.
  virtual std::uint64_t start(const char* what, std::uint64_t bytes) noexcept = 0;
  virtual void end(std::uint64_t range) noexcept = 0;
  // A range of the calling thread; they nest.
  virtual void push(const char* what) noexcept = 0;
  virtual void pop() noexcept = 0;
  // A moment.
  virtual void mark(const char* what, std::uint64_t bytes) noexcept = 0;

 protected:
  ~Tracer() = default;
};

// The tracer that NIXL_TRACE_BACKENDS names ("nvtx"), or NVTX when a profiler has set NVTX_INJECTION64_PATH and nothing is
// named; null: none. Warns of a name that is unknown or not built in.
Tracer* open_tracer(const Settings& settings, const std::string& agent);

// Null: built without the NVTX headers.
Tracer* nvtx_tracer() noexcept;

// A call as a range of this thread.
class TracedCall {
 public:
  TracedCall(Tracer* tracer, const char* what) noexcept : tracer_(tracer) {
    if (tracer_) tracer_->push(what);
  }
  ~TracedCall() {
    if (tracer_) tracer_->pop();
  }
  TracedCall(const TracedCall&) = delete;
  TracedCall& operator=(const TracedCall&) = delete;

 private:
  Tracer* const tracer_;
};

}  // namespace nixl::core
