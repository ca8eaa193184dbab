// A thread of its own for one worker: it polls while something happens there, then sleeps on the worker's descriptor.
#pragma once
#include <atomic>
#include <memory>
#include <thread>

#include "backends/ucx/worker.h"
#include "base/fd.h"

namespace nixl::core::ucx {

class Driver {
 public:
  // `worker` outlives the driver.
  static Result<std::unique_ptr<Driver>> start(Worker& worker);
  ~Driver();
  // There is work that no event announces. Any thread.
  void wake() noexcept;

 private:
  explicit Driver(Worker& worker) : worker_(worker) {}
  void loop();

  Worker& worker_;
  Fd wake_;
  std::atomic<bool> asleep_{false}, stopping_{false};
  std::thread thread_;
};

}  // namespace nixl::core::ucx
