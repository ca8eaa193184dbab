// Work without the GIL, in threads that may outlive the interpreter.
#pragma once
#include <cxxabi.h>
#include <nanobind/nanobind.h>
#include <unistd.h>

namespace nixl::python {

// Gives the GIL up for its scope. A daemon thread that comes back when the interpreter has ended is ended by Python through
// pthread_exit, whose unwinding no frame of a binding lets through: it stays here until the process exits.
class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (const abi::__forced_unwind&) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* state_;
};

}  // namespace nixl::python
