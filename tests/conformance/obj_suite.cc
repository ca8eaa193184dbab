// The suite on OBJ, against the S3 server that NIXL_TEST_S3 names.
#include <cstdlib>

#include "backends/obj/obj.h"
#include "check.h"
#include "conformance/backend_suite.h"
#include "http/client.h"

using namespace nixl::core;

namespace {

class Object final : public conformance::Target {
 public:
  Object(std::string url, std::size_t bytes)
      : url_(std::move(url)), client_(std::move(*CHECK_OK(http::Client::open({})))) {
    set_contents(std::string(bytes, 'R'));
  }
  Region region() const override { return {MemKind::kObject, 0, 0, 3, "suite/object"}; }
  std::string contents() override { return ask("GET", "").text; }
  void set_contents(const std::string& bytes) override { ask("PUT", bytes); }

 private:
  http::Reply ask(const char* method, const std::string& body) {
    http::Call call;
    call.method = method;
    // The server believes any signature, but tells objects from nobody.
    call.headers = {
        "Authorization: AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, "
        "Signature=0"};
    call.url = url_ + "/bucket/suite/object";
    call.body = {{const_cast<char*>(body.data()), body.size()}};
    const http::Outcome outcome = client_->perform(std::move(call));
    CHECK(!outcome.failed && outcome.reply.ok());
    return outcome.reply;
  }
  std::string url_;
  std::unique_ptr<http::Client> client_;
};

}  // namespace

int main(int argc, char** argv) {
  const char* server = std::getenv("NIXL_TEST_S3");
  if (!server) {
    std::fprintf(stderr, "SKIP: NIXL_TEST_S3 names no S3 server\n");
    return 77;
  }
  conformance::BackendCase which;
  which.entry = &backends_of_obj()[0];
  which.params = {{"bucket", "bucket"}, {"access_key", "k"}, {"secret_key", "s"}, {"endpoint_override", server}};
  which.bad_params = {{{"accelerated", "perhaps"}}, {{"type", "dell"}}};
  which.make_target = [&](std::size_t bytes) { return std::make_unique<Object>(server, bytes); };
  which.max_bytes = 2 << 20;
  which.max_blocks = 1000;
  which.whole_targets = true;
  return conformance::run_backend_suite(which, argc, argv);
}
