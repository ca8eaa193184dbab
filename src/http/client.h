// Client: HTTP requests on a few threads, each running one libcurl multi handle. Connections are kept and reused;
// bodies are read from and written to the caller's memory directly.
//
// Threads: everything may be called from any thread. Callbacks run on a thread of the client, must not block, and may
// start further calls. Memory named by a Call belongs to libcurl until its callback ran.
#pragma once
#include <sys/uio.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/result.h"

namespace nixl::core::http {

struct Call {
  std::string method = "GET";  // GET, HEAD, PUT, POST, DELETE
  std::string url;
  std::vector<std::string> headers;               // "Name: value"
  std::vector<iovec> body;                        // sent in order; must stay valid
  std::string text_body;                          // instead of `body`: small and owned
  std::vector<iovec> sink;                        // where the body of a 2xx answer goes; empty: into Reply::text
  std::function<void(std::string_view)> on_data;  // instead of a sink: pieces of a 2xx body as they come
  Deadline deadline = Deadline::never();
  Nanoseconds stall_ns = 30'000'000'000;  // no byte for so long ends the call; 0: never (watches)
};

struct Reply {
  int status = 0;
  std::string text;            // body, unless it went elsewhere; of an error at most 64 KiB
  std::uint64_t received = 0;  // bytes of the body
  std::vector<std::pair<std::string, std::string>> headers;  // names in lower case

  std::string_view header(std::string_view lower_case_name) const noexcept;
  bool ok() const noexcept { return status >= 200 && status < 300; }
};

// What became of a call: a reply with any status, or an error on the way. `transient`: the same call may succeed if
// repeated.
struct Outcome {
  Call call;  // what was sent
  Reply reply;
  bool failed = false;
  bool transient = false;
  Error error;
};

using CallId = std::uint64_t;

struct ClientConfig {
  unsigned num_threads = 1;
  unsigned connections_per_host = 32;  // for each thread
  std::string ca_bundle;               // path of a PEM file; empty: the system's
  Nanoseconds connect_timeout_ns = 5'000'000'000;
};

class Client {
 public:
  static Result<std::unique_ptr<Client>> open(const ClientConfig& config);
  // Ends all calls; their callbacks have run when it returns.
  ~Client();

  // Never blocks. The callback runs exactly once, maybe before start() returns. With `make` the call is made, on a
  // thread of the client, when it is time to send it: after `delay`.
  CallId start(Call call, std::function<void(Outcome)> callback);
  CallId start(std::function<Call()> make, Nanoseconds delay, std::function<void(Outcome)> callback);
  // Ends one call soon; its callback says kCancelled unless it was quicker. Unknown ids are ignored.
  void cancel(CallId id) noexcept;
  // Starts the call and waits for its end (by its deadline).
  Outcome perform(Call call);

 private:
  class Loop;
  Client() = default;
  std::vector<std::unique_ptr<Loop>> loops_;
  pid_t owner_ = 0;
};

}  // namespace nixl::core::http
