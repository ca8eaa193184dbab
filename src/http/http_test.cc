// The client against a server of this process that answers by path, well and badly.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <future>
#include <list>
#include <thread>

#include "base/fd.h"
#include "check.h"
#include "fuzz.h"
#include "http/client.h"
#include "http/json.h"
#include "http/text.h"

using namespace nixl::core;
using namespace nixl::core::http;

namespace {

bool send_all(int fd, const std::string& bytes) {
  std::size_t at = 0;
  while (at < bytes.size()) {
    const ssize_t n = ::send(fd, bytes.data() + at, bytes.size() - at, MSG_NOSIGNAL);
    if (n <= 0) return false;
    at += static_cast<std::size_t>(n);
  }
  return true;
}
std::string answer(int status, const std::string& body, std::size_t claimed) {
  return "HTTP/1.1 " + std::to_string(status) + " X\r\nContent-Length: " + std::to_string(claimed) +
         "\r\nX-Thing: a: b\r\n\r\n" + body;
}

class Server {
 public:
  Server() : listener_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    CHECK(::bind(listener_.get(), reinterpret_cast<sockaddr*>(&address), size) == 0);
    CHECK(::listen(listener_.get(), 64) == 0);
    CHECK(::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    url = "http://127.0.0.1:" + std::to_string(ntohs(address.sin_port));
    acceptor_ = std::thread([this] {
      for (;;) {
        const int fd = ::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC);
        if (fd < 0) return;
        ++num_connections;
        sockets_.emplace_back(fd);
        talkers_.emplace_back([this, fd] { talk(fd); });
      }
    });
  }
  ~Server() {
    ::shutdown(listener_.get(), SHUT_RDWR);
    acceptor_.join();
    for (const Fd& fd : sockets_) ::shutdown(fd.get(), SHUT_RDWR);
    for (std::thread& thread : talkers_) thread.join();
  }
  std::string url;
  std::atomic<int> num_connections{0};

 private:
  void talk(int fd) {
    std::string in;
    char buffer[65536];
    for (;;) {
      std::size_t end;
      while ((end = in.find("\r\n\r\n")) == std::string::npos) {
        const ssize_t n = ::recv(fd, buffer, sizeof buffer, 0);
        if (n <= 0) return;
        in.append(buffer, static_cast<std::size_t>(n));
      }
      const std::string head = in.substr(0, end);
      in.erase(0, end + 4);
      std::size_t size = 0;
      if (const auto at = head.find("Content-Length: "); at != std::string::npos)
        size = std::stoul(head.substr(at + 16));
      while (in.size() < size) {
        const ssize_t n = ::recv(fd, buffer, sizeof buffer, 0);
        if (n <= 0) return;
        in.append(buffer, static_cast<std::size_t>(n));
      }
      const std::string body = in.substr(0, size);
      in.erase(0, size);
      const std::size_t slash = head.find('/');
      const std::string path = head.substr(slash, head.find_first_of(" ?", slash) - slash);
      if (path == "/never") continue;
      if (path == "/half") {
        send_all(fd, answer(200, std::string(1000, 'h'), 2000));
        ::shutdown(fd, SHUT_RDWR);
        return;
      }
      const std::string reply = path == "/echo"     ? answer(200, body, body.size())
                                : path == "/method" ? answer(200, head.substr(0, head.find(' ')), head.find(' '))
                                : path == "/head"   ? answer(200, "", 77)
                                                    : answer(404, "no " + path, path.size() + 3);
      if (!send_all(fd, reply)) return;
    }
  }
  Fd listener_;
  std::thread acceptor_;
  std::list<Fd> sockets_;
  std::list<std::thread> talkers_;
};

std::unique_ptr<Client> open_client(unsigned threads = 1) {
  ClientConfig config;
  config.num_threads = threads;
  return std::move(*CHECK_OK(Client::open(config)));
}

}  // namespace

TEST(texts) {
  CHECK_EQ(percent_encode("a b/ü~", true), "a%20b/%C3%BC~");
  CHECK_EQ(percent_encode("a/b", false), "a%2Fb");
  for (const char* text : {"", "f", "fo", "foo", "foob"}) CHECK_EQ(*CHECK_OK(base64_decode(base64_encode(text))), text);
  CHECK_EQ(base64_encode("foob"), "Zm9vYg==");
  CHECK(!base64_decode("a?b"));
  CHECK_EQ(http_date(784111777), "Sun, 06 Nov 1994 08:49:37 GMT");
  CHECK_EQ(xml_element("<E><Code>No&amp;Such</Code></E>", "Code"), "No&Such");
  CHECK_EQ(xml_element("<E>", "Code"), "");
  const Url url = *CHECK_OK(parse_url("https://h:1/a/b?c=d"));
  CHECK(url.scheme == "https" && url.host == "h:1" && url.path == "/a/b" && url.query == "c=d");
  CHECK(!parse_url("h:1") && !parse_url("ftp://h"));
}

TEST(json) {
  const Json value = *CHECK_OK(Json::parse(R"( {"a":[1,{"b":"x\n\u00e9\ud83d\ude00"}],"c":true,"n":null,"e":{}} )"));
  CHECK_EQ(value["a"].items().size(), 2u);
  CHECK_EQ(value["a"].items()[0].text(), "1");
  CHECK_EQ(value["a"].items()[1]["b"].text(), "x\n\xc3\xa9\xf0\x9f\x98\x80");
  CHECK(value["c"].text() == "true" && value["n"].text().empty() && value["no"]["way"].text().empty());
  const std::string good = R"({"a":[1,2,{"b":"\u1234"}]})";
  for (std::size_t size = 0; size < good.size(); ++size) CHECK(!Json::parse(good.substr(0, size)));
  for (const char* bad : {"{} x", "[1,]", "{1:2}", "\"\\q\"", "\"\\u12g4\""}) CHECK(!Json::parse(bad));
  CHECK(!Json::parse(std::string(100000, '[')));
  CHECK_EQ(Json::parse(R"("a\"\\\n")")->text(), "a\"\\\n");
}

TEST(damaged_texts_are_refused_or_read_and_no_more) {
  check::fuzz(R"({"kvs":[{"key":"Zm9v","mod_revision":"12"},-1.5e3,true,null],"n":{"\u00e9\ud83d\ude00":[[],{}]}})",
              [](const std::string& text) {
                const auto value = Json::parse(text);
                if (value) (void)(*value)["kvs"].items().size();
              });
  check::fuzz(base64_encode("some bytes that are coded"), [](const std::string& text) {
    const auto bytes = base64_decode(text);
    if (bytes) CHECK(bytes->size() <= text.size());
  });
  const std::string error =
      "<?xml version=\"1.0\"?><Error><Code>Slow&amp;Down</Code><Message>&lt;x&gt;</Message></Error>";
  check::fuzz(error, [](const std::string& xml) {
    for (const char* name : {"Code", "Message", "UploadId"}) CHECK(xml_element(xml, name).size() <= xml.size());
  });
  check::fuzz("https://host:123/path/of?a=b&c=d", [](const std::string& text) {
    if (const auto url = parse_url(text)) CHECK(!url->host.empty());
  });
}

TEST(bodies_both_ways_over_one_connection) {
  Server server;
  auto client = open_client();
  std::string out(3 << 20, 'x');
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<char>(i * 2654435761u >> 13);
  std::string in(out.size(), '?');
  for (int round = 0; round < 5; ++round) {
    Call call;
    call.method = "PUT";
    call.url = server.url + "/echo";
    call.body = {{out.data(), 1000}, {out.data() + 1000, out.size() - 1000}};
    call.sink = {{in.data(), 5}, {in.data() + 5, in.size() - 5}};
    const Outcome outcome = client->perform(std::move(call));
    CHECK(!outcome.failed && outcome.reply.status == 200);
    CHECK_EQ(outcome.reply.received, out.size());
    CHECK_EQ(outcome.reply.header("x-thing"), "a: b");
    CHECK(in == out);
  }
  CHECK_EQ(server.num_connections.load(), 1);
}

TEST(methods) {
  Server server;
  auto client = open_client();
  for (const char* method : {"GET", "POST", "DELETE", "PUT"}) {
    Call call;
    call.method = method;
    call.url = server.url + "/method";
    CHECK_EQ(client->perform(std::move(call)).reply.text, method);
  }
  Call head;
  head.method = "HEAD";
  head.url = server.url + "/head";
  const Outcome outcome = client->perform(std::move(head));
  CHECK(!outcome.failed && outcome.reply.header("content-length") == "77");
}

TEST(a_status_is_no_failure_but_its_text_is_kept) {
  Server server;
  auto client = open_client();
  Call call;
  char sink[4] = "abc";
  call.url = server.url + "/missing";
  call.sink = {{sink, 3}};
  const Outcome outcome = client->perform(std::move(call));
  CHECK(!outcome.failed && outcome.reply.status == 404);
  CHECK_EQ(outcome.reply.text, "no /missing");
  CHECK_EQ(std::string(sink), "abc");
}

TEST(cut_and_oversized_bodies_fail) {
  Server server;
  auto client = open_client();
  std::string sink(2000, '.');
  Call half;
  half.url = server.url + "/half?secret=1";
  half.sink = {{sink.data(), sink.size()}};
  const Outcome cut = client->perform(std::move(half));
  CHECK(cut.failed && cut.transient);
  CHECK(cut.error.reason.find("after 1000 bytes") != std::string::npos);
  CHECK(cut.error.reason.find("secret") == std::string::npos);
  Call big;
  big.method = "PUT";
  big.url = server.url + "/echo";
  big.text_body = "12345";
  big.sink = {{sink.data(), 4}};
  const Outcome over = client->perform(std::move(big));
  CHECK(over.failed && !over.transient && over.error.reason.find("more than the 4 bytes") != std::string::npos);
}

TEST(deadline_and_cancel) {
  Server server;
  auto client = open_client();
  Call slow;
  slow.url = server.url + "/never";
  slow.deadline = Deadline::after(50'000'000);
  const Outcome late = client->perform(std::move(slow));
  CHECK(late.failed && late.error.code == Code::kTimeout && late.transient);
  std::promise<Outcome> ended;
  Call endless;
  endless.url = server.url + "/never";
  const CallId id = client->start(std::move(endless), [&](Outcome o) { ended.set_value(std::move(o)); });
  client->cancel(id);
  auto result = ended.get_future();
  CHECK(result.wait_for(std::chrono::seconds(10)) == std::future_status::ready);
  CHECK(result.get().error.code == Code::kCancelled);
}

TEST(a_silent_server_is_given_up) {
  Server server;
  auto client = open_client();
  Call silent;
  silent.url = server.url + "/never";
  silent.stall_ns = 1'000'000'000;
  const Outcome outcome = client->perform(std::move(silent));
  CHECK(outcome.failed && outcome.transient && outcome.error.reason.find("too slow") != std::string::npos);
}

TEST(closing_ends_every_call) {
  Server server;
  std::atomic<int> ended{0};
  {
    auto client = open_client(2);
    for (int i = 0; i < 20; ++i) {
      Call call;
      call.url = server.url + "/never";
      client->start(std::move(call), [&](Outcome o) { ended += o.failed; });
    }
  }
  CHECK_EQ(ended.load(), 20);
}

TEST(nobody_there) {
  auto client = open_client();
  Call call;
  call.url = "http://127.0.0.1:1/x";
  const Outcome outcome = client->perform(std::move(call));
  CHECK(outcome.failed && outcome.transient && outcome.error.code == Code::kIo);
  CHECK(outcome.error.reason.find("127.0.0.1") != std::string::npos);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
