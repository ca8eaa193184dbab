#include "http/client.h"

#include <curl/curl.h>
#include <pthread.h>
#include <signal.h>
#include <strings.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <unordered_map>

namespace nixl::core::http {
namespace {

constexpr std::size_t kMaxErrorText = 64 << 10;
constexpr std::size_t kMaxText = 64 << 20;
constexpr long kBuffer =
    256 << 10;  // of libcurl, each way: large enough for few calls, small enough to stay in the cache

std::uint64_t bytes_of(const std::vector<iovec>& list) {
  std::uint64_t sum = 0;
  for (const iovec& part : list) sum += part.iov_len;
  return sum;
}

// A place in a list of memory pieces.
struct Cursor {
  std::size_t part = 0, at = 0;
  // Copies up to `size` bytes between `flat` and the list; returns how many fitted.
  std::size_t copy(const std::vector<iovec>& list, char* flat, std::size_t size, bool into_list) {
    std::size_t moved = 0;
    while (moved < size && part < list.size()) {
      const std::size_t n = std::min(size - moved, list[part].iov_len - at);
      char* place = static_cast<char*>(list[part].iov_base) + at;
      into_list ? std::memcpy(place, flat + moved, n) : std::memcpy(flat + moved, place, n);
      moved += n;
      at += n;
      if (at == list[part].iov_len) ++part, at = 0;
    }
    return moved;
  }
};

struct Exchange {
  CallId id = 0;
  Call call;
  std::function<Call()> make;  // instead of a call
  Nanoseconds not_before = 0;
  std::function<void(Outcome)> callback;
  Outcome outcome;
  Cursor sent, stored;
  bool overflow = false;
  curl_slist* headers = nullptr;
  char error[CURL_ERROR_SIZE] = {};
  ~Exchange() { curl_slist_free_all(headers); }
};

// Signatures may stand in the query: messages show the URL without it.
std::string shown(const Call& call) {
  return call.method + " " + call.url.substr(0, call.url.find('?'));
}

std::size_t on_read(char* buffer, std::size_t size, std::size_t count, void* user) {
  auto& exchange = *static_cast<Exchange*>(user);
  return exchange.sent.copy(exchange.call.body, buffer, size * count, false);
}
int on_seek(void* user, curl_off_t offset, int origin) {
  if (origin != SEEK_SET || offset != 0) return CURL_SEEKFUNC_CANTSEEK;
  static_cast<Exchange*>(user)->sent = {};
  return CURL_SEEKFUNC_OK;
}
std::size_t on_write(char* data, std::size_t size, std::size_t count, void* user) {
  auto& exchange = *static_cast<Exchange*>(user);
  const std::size_t bytes = size * count;
  Reply& reply = exchange.outcome.reply;
  reply.received += bytes;
  if (reply.ok() && exchange.call.on_data) {
    exchange.call.on_data({data, bytes});
  } else if (reply.ok() && !exchange.call.sink.empty()) {
    exchange.overflow = exchange.stored.copy(exchange.call.sink, data, bytes, true) < bytes;
    return exchange.overflow ? 0 : bytes;
  } else {
    const std::size_t limit = reply.ok() ? kMaxText : kMaxErrorText;
    reply.text.append(data, std::min(bytes, limit - std::min(limit, reply.text.size())));
  }
  return bytes;
}
std::size_t on_header(char* data, std::size_t size, std::size_t count, void* user) {
  Reply& reply = static_cast<Exchange*>(user)->outcome.reply;
  std::string_view line(data, size * count);
  while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.remove_suffix(1);
  if (line.substr(0, 5) == "HTTP/") {  // a further status line replaces the one before (100 Continue)
    reply.headers.clear();
    const std::size_t space = line.find(' ');
    reply.status = space == std::string_view::npos ? 0 : std::atoi(std::string(line.substr(space + 1, 3)).c_str());
  } else if (const std::size_t colon = line.find(':'); colon != std::string_view::npos) {
    std::string name(line.substr(0, colon));
    for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    std::string_view value = line.substr(colon + 1);
    while (!value.empty() && value.front() == ' ') value.remove_prefix(1);
    reply.headers.emplace_back(std::move(name), std::string(value));
  }
  return size * count;
}

bool worth_repeating(CURLcode code) {
  switch (code) {
    case CURLE_COULDNT_RESOLVE_HOST:
    case CURLE_COULDNT_CONNECT:
    case CURLE_OPERATION_TIMEDOUT:
    case CURLE_SEND_ERROR:
    case CURLE_RECV_ERROR:
    case CURLE_GOT_NOTHING:
    case CURLE_PARTIAL_FILE:
    case CURLE_SSL_CONNECT_ERROR:
    case CURLE_HTTP2:
    case CURLE_HTTP2_STREAM:
      return true;
    default:
      return false;
  }
}

Error curl_error(const Exchange& exchange, CURLcode code) {
  std::string reason = shown(exchange.call) + ": " + curl_easy_strerror(code) + " (curl " + std::to_string(code) + ")";
  if (exchange.overflow)
    reason = shown(exchange.call) + ": the server sent more than the " + std::to_string(bytes_of(exchange.call.sink)) +
             " bytes asked for";
  else if (exchange.error[0])
    reason += std::string(": ") + exchange.error;
  if (exchange.outcome.reply.received > 0)
    reason += ", after " + std::to_string(exchange.outcome.reply.received) + " bytes of the answer";
  return {code == CURLE_OPERATION_TIMEDOUT ? Code::kTimeout : Code::kIo, reason};
}

}  // namespace

// One thread with one multi handle.
class Client::Loop {
 public:
  static Result<std::unique_ptr<Loop>> open(const ClientConfig& config) {
    std::unique_ptr<Loop> loop(new Loop(config));
    loop->multi_ = curl_multi_init();
    if (!loop->multi_) return fail(Code::kIo, "curl_multi_init failed: out of memory");
    curl_multi_setopt(loop->multi_, CURLMOPT_MAX_HOST_CONNECTIONS, static_cast<long>(config.connections_per_host));
    curl_multi_setopt(loop->multi_, CURLMOPT_MAXCONNECTS, static_cast<long>(config.connections_per_host));
    sigset_t all, before;  // signals are the program's own threads' business
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    try {
      loop->thread_ = std::thread([raw = loop.get()] { raw->run(); });
    } catch (const std::system_error& e) {
      error = e.code().value();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error) return fail(errno_error("start an HTTP thread", error));
    return loop;
  }
  ~Loop() {
    if (!thread_.joinable()) {
      if (multi_) curl_multi_cleanup(multi_);
      return;
    }
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    curl_multi_wakeup(multi_);
    thread_.join();
    for (CURL* easy : spare_) curl_easy_cleanup(easy);
    curl_multi_cleanup(multi_);
  }
  // In the child of a fork the thread does not exist.
  void abandon() { thread_.detach(); }

  void start(std::unique_ptr<Exchange> exchange) {
    {
      const std::lock_guard lock(mutex_);
      incoming_.push_back(std::move(exchange));
    }
    curl_multi_wakeup(multi_);
  }
  void cancel(CallId id) {
    {
      const std::lock_guard lock(mutex_);
      cancelled_.push_back(id);
    }
    curl_multi_wakeup(multi_);
  }

 private:
  explicit Loop(const ClientConfig& config) : config_(config) {}

  void run() {
    for (;;) {
      std::vector<std::unique_ptr<Exchange>> incoming;
      std::vector<CallId> cancelled;
      bool stop = false;
      {
        const std::lock_guard lock(mutex_);
        incoming.swap(incoming_);
        cancelled.swap(cancelled_);
        stop = stop_;
      }
      for (auto& exchange : incoming) {
        if (exchange->not_before > 0)
          delayed_.push_back(std::move(exchange));
        else
          add(std::move(exchange));
      }
      for (const CallId id : cancelled) drop(id, "cancelled");
      if (stop) {
        while (!delayed_.empty()) drop(delayed_.back()->id, "the client is closing");
        while (!running_.empty()) drop(running_.begin()->second.exchange->id, "the client is closing");
        const std::lock_guard lock(mutex_);
        if (incoming_.empty()) return;
        continue;
      }
      const int pause_ms = add_delayed();
      int left = 0;
      curl_multi_perform(multi_, &left);
      collect();
      curl_multi_poll(multi_, nullptr, 0, pause_ms, nullptr);
    }
  }

  // Sends those whose time has come; returns the time until the next, in milliseconds.
  int add_delayed() {
    std::vector<std::unique_ptr<Exchange>> due;
    const Nanoseconds now = now_ns();
    Nanoseconds next = 1'000'000'000;
    for (auto& exchange : delayed_) {
      if (exchange->not_before <= now)
        due.push_back(std::move(exchange));
      else
        next = std::min(next, exchange->not_before - now);
    }
    std::erase(delayed_, nullptr);
    for (auto& exchange : due) add(std::move(exchange));
    return static_cast<int>(next / 1'000'000 + 1);
  }

  void add(std::unique_ptr<Exchange> exchange) {
    if (exchange->make) exchange->call = exchange->make();
    CURL* easy = spare_.empty() ? curl_easy_init() : spare_.back();
    if (!spare_.empty()) spare_.pop_back();
    if (!easy || exchange->call.deadline.passed()) {
      Outcome outcome;
      outcome.failed = true;
      outcome.error = easy ? Error{Code::kTimeout, shown(exchange->call) + ": the deadline passed before it was sent"}
                           : Error{Code::kIo, "curl_easy_init failed: out of memory"};
      if (easy) spare_.push_back(easy);
      exchange->callback(std::move(outcome));
      return;
    }
    set_up(easy, *exchange);
    const CallId id = exchange->id;
    by_handle_[easy] = id;
    running_[id] = {easy, std::move(exchange)};
    curl_multi_add_handle(multi_, easy);
  }

  void set_up(CURL* easy, Exchange& exchange) {
    const Call& call = exchange.call;
    if (!call.text_body.empty())
      exchange.call.body = {{exchange.call.text_body.data(), exchange.call.text_body.size()}};
    curl_easy_setopt(easy, CURLOPT_URL, call.url.c_str());
    curl_easy_setopt(easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(easy, CURLOPT_ERRORBUFFER, exchange.error);
    curl_easy_setopt(easy, CURLOPT_TCP_KEEPALIVE, 1L);
    curl_easy_setopt(easy, CURLOPT_TCP_KEEPIDLE, 10L);
    curl_easy_setopt(easy, CURLOPT_TCP_KEEPINTVL, 5L);
    curl_easy_setopt(easy, CURLOPT_BUFFERSIZE, kBuffer);
    curl_easy_setopt(easy, CURLOPT_UPLOAD_BUFFERSIZE, kBuffer);
    curl_easy_setopt(easy, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(config_.connect_timeout_ns / 1'000'000));
    if (call.deadline.at() != Deadline::never().at())
      curl_easy_setopt(easy, CURLOPT_TIMEOUT_MS, std::max(1L, static_cast<long>(call.deadline.left_ms())));
    if (call.stall_ns > 0) {
      curl_easy_setopt(easy, CURLOPT_LOW_SPEED_LIMIT, 1L);
      curl_easy_setopt(easy, CURLOPT_LOW_SPEED_TIME, std::max(1L, static_cast<long>(call.stall_ns / 1'000'000'000)));
    }
    if (!config_.ca_bundle.empty()) curl_easy_setopt(easy, CURLOPT_CAINFO, config_.ca_bundle.c_str());
    curl_easy_setopt(easy, CURLOPT_HTTP_VERSION, static_cast<long>(CURL_HTTP_VERSION_2TLS));

    curl_easy_setopt(easy, CURLOPT_CUSTOMREQUEST, call.method.c_str());
    if (call.method == "HEAD") {
      curl_easy_setopt(easy, CURLOPT_NOBODY, 1L);
    } else if (call.method != "GET" && (call.method != "DELETE" || !call.body.empty())) {
      curl_easy_setopt(easy, CURLOPT_UPLOAD, 1L);
      curl_easy_setopt(easy, CURLOPT_INFILESIZE_LARGE, static_cast<curl_off_t>(bytes_of(call.body)));
      curl_easy_setopt(easy, CURLOPT_READFUNCTION, &on_read);
      curl_easy_setopt(easy, CURLOPT_READDATA, &exchange);
      curl_easy_setopt(easy, CURLOPT_SEEKFUNCTION, &on_seek);
      curl_easy_setopt(easy, CURLOPT_SEEKDATA, &exchange);
      exchange.headers = curl_slist_append(exchange.headers, "Expect:");
    }
    for (const std::string& header : call.headers)
      exchange.headers = curl_slist_append(exchange.headers, header.c_str());
    if (exchange.headers) curl_easy_setopt(easy, CURLOPT_HTTPHEADER, exchange.headers);
    curl_easy_setopt(easy, CURLOPT_WRITEFUNCTION, &on_write);
    curl_easy_setopt(easy, CURLOPT_WRITEDATA, &exchange);
    curl_easy_setopt(easy, CURLOPT_HEADERFUNCTION, &on_header);
    curl_easy_setopt(easy, CURLOPT_HEADERDATA, &exchange);
  }

  void collect() {
    int waiting = 0;
    while (const CURLMsg* message = curl_multi_info_read(multi_, &waiting)) {
      if (message->msg != CURLMSG_DONE) continue;
      const CURLcode code = message->data.result;
      const auto exchange = take(by_handle_.at(message->easy_handle));
      Outcome& outcome = exchange->outcome;
      if (code != CURLE_OK) {
        outcome.failed = true;
        outcome.transient = worth_repeating(code);
        outcome.error = curl_error(*exchange, code);
      }
      outcome.call = std::move(exchange->call);
      exchange->callback(std::move(outcome));
    }
  }
  void drop(CallId id, const char* why) {
    std::unique_ptr<Exchange> exchange;
    if (running_.contains(id)) {
      exchange = take(id);
    } else {
      const auto at = std::find_if(delayed_.begin(), delayed_.end(), [&](const auto& one) { return one->id == id; });
      if (at == delayed_.end()) return;
      exchange = std::move(*at);
      delayed_.erase(at);
    }
    Outcome outcome;
    outcome.failed = true;
    outcome.error = {Code::kCancelled, shown(exchange->call) + ": " + why};
    exchange->callback(std::move(outcome));
  }
  // Out of libcurl's hands: from here on it touches no memory of the call.
  std::unique_ptr<Exchange> take(CallId id) {
    auto node = running_.extract(id);
    CURL* easy = node.mapped().easy;
    curl_multi_remove_handle(multi_, easy);
    by_handle_.erase(easy);
    curl_easy_reset(easy);
    spare_.push_back(easy);
    return std::move(node.mapped().exchange);
  }

  struct Running {
    CURL* easy = nullptr;
    std::unique_ptr<Exchange> exchange;
  };

  const ClientConfig config_;
  CURLM* multi_ = nullptr;
  std::thread thread_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<Exchange>> incoming_;
  std::vector<CallId> cancelled_;
  bool stop_ = false;
  // Used by the thread only:
  std::unordered_map<CallId, Running> running_;
  std::unordered_map<CURL*, CallId> by_handle_;
  std::vector<CURL*> spare_;
  std::vector<std::unique_ptr<Exchange>> delayed_;
};

std::string_view Reply::header(std::string_view name) const noexcept {
  for (const auto& [key, value] : headers)
    if (key == name) return value;
  return {};
}

Result<std::unique_ptr<Client>> Client::open(const ClientConfig& config) {
  static const CURLcode global = curl_global_init(CURL_GLOBAL_DEFAULT);
  if (global != CURLE_OK) return fail(Code::kIo, "curl_global_init: %s", curl_easy_strerror(global));
  std::unique_ptr<Client> client(new Client);
  client->owner_ = ::getpid();
  for (unsigned i = 0; i < std::max(1u, config.num_threads); ++i) {
    NIXL_ASSIGN(auto loop, Loop::open(config));
    client->loops_.push_back(std::move(loop));
  }
  return client;
}

Client::~Client() {
  if (::getpid() == owner_) return;
  for (auto& loop : loops_) {
    loop->abandon();
    (void)loop.release();
  }
}

namespace {

CallId next_id() {
  static std::atomic<CallId> next{1};
  return next++;
}

}  // namespace

CallId Client::start(Call call, std::function<void(Outcome)> callback) {
  auto exchange = std::make_unique<Exchange>();
  const CallId id = exchange->id = next_id();
  exchange->call = std::move(call);
  exchange->callback = std::move(callback);
  loops_[id % loops_.size()]->start(std::move(exchange));
  return id;
}

CallId Client::start(std::function<Call()> make, Nanoseconds delay, std::function<void(Outcome)> callback) {
  auto exchange = std::make_unique<Exchange>();
  const CallId id = exchange->id = next_id();
  exchange->make = std::move(make);
  exchange->not_before = delay > 0 ? now_ns() + delay : 0;
  exchange->callback = std::move(callback);
  loops_[id % loops_.size()]->start(std::move(exchange));
  return id;
}

void Client::cancel(CallId id) noexcept {
  loops_[id % loops_.size()]->cancel(id);
}

Outcome Client::perform(Call call) {
  std::mutex mutex;
  std::condition_variable ended;
  std::unique_ptr<Outcome> result;
  start(std::move(call), [&](Outcome outcome) {
    const std::lock_guard lock(mutex);
    result = std::make_unique<Outcome>(std::move(outcome));
    ended.notify_one();
  });
  std::unique_lock lock(mutex);
  ended.wait(lock, [&] { return result != nullptr; });
  return std::move(*result);
}

}  // namespace nixl::core::http
