// Signatures against the examples that AWS publishes; where keys come from; parameters; registrations. With
// NIXL_TEST_S3=http://host:port (a server with a bucket "bucket"), also transfers: obj_server_test runs it so.
#include "backends/obj/obj.h"

#include <stdlib.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "backends/obj/credentials.h"
#include "backends/obj/sigv4.h"
#include "base/env.h"
#include "base/sha256.h"
#include "check.h"
#include "fuzz.h"
#include "http/text.h"
#include "plans.h"

using namespace nixl::core;

namespace {

const BackendEntry& entry() {
  return backends_of_obj()[0];
}

Result<std::unique_ptr<Backend>> try_open(Params over) {
  BackendConfig config;
  config.self = {"agent", 1};
  config.params = entry().params;
  for (const auto& [key, value] : over) config.params[key] = value;
  return entry().open(std::move(config));
}
std::string refusal(Params over) {
  const auto opened = try_open(std::move(over));
  CHECK(!opened);
  return opened.error().reason;
}
using check::has;

// The request of AWS's published examples: bucket examplebucket, 24 May 2013.
s3::ToSign example(const char* method, const char* path) {
  s3::ToSign request;
  request.method = method;
  request.host = "examplebucket.s3.amazonaws.com";
  request.path = path;
  request.payload_hash = http::hex(sha256(""));
  request.region = "us-east-1";
  request.when = 1369353600;
  return request;
}
std::string signature(const s3::ToSign& request) {
  const s3::Credentials keys = {"AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", ""};
  const std::string line = s3::sign(request, keys).back();
  return line.substr(line.find("Signature=") + 10);
}

void clear_environment() {
  for (const char* name :
       {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION",
        "AWS_DEFAULT_REGION", "AWS_DEFAULT_BUCKET", "AWS_ENDPOINT_OVERRIDE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"})
    ::unsetenv(name);
  ::setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent", 1);
  ::setenv("AWS_CONFIG_FILE", "/nonexistent", 1);
  ::setenv("AWS_EC2_METADATA_DISABLED", "true", 1);
}

// A backend on the server of NIXL_TEST_S3, one buffer, transfers of it.
struct Rig {
  Rig() {
    backend = std::move(*CHECK_OK(try_open({{"bucket", "bucket"},
                                            {"access_key", "k"},
                                            {"secret_key", "s"},
                                            {"endpoint_override", *env_text("NIXL_TEST_S3")}})));
    self = std::move(*CHECK_OK(backend->connect({"agent", 1}, "")));
  }
  struct Piece {
    std::uint64_t object, offset;
    std::string* memory;
  };
  std::unique_ptr<Transfer> prepare(Op op, std::vector<Piece> pieces) {
    owned.push_back(std::move(*CHECK_OK(backend->add_region({kind, 0, 0, 0, ""}))));
    Plan plan;
    plan.op = op;
    plan.local_kind = kind;
    plan.local_regions = {owned.back().get()};
    plan.remote_kind = MemKind::kObject;
    plan.peer = self.get();
    for (const Piece& piece : pieces) {
      const Region region = {MemKind::kObject, 0, 0, piece.object, "dir/obj " + std::to_string(piece.object)};
      owned.push_back(std::move(*CHECK_OK(backend->add_region(region))));
      targets.push_back(std::move(*CHECK_OK(backend->loopback_region(*self, region, *owned.back()))));
      test::add_block(plan, reinterpret_cast<std::uint64_t>(piece.memory->data()), piece.offset, piece.memory->size(),
                      static_cast<std::uint32_t>(plan.remote_regions.size()));
      plan.remote_regions.push_back(targets.back().get());
    }
    auto prepared = backend->prepare(std::move(plan));
    last_error = prepared ? "" : prepared.error().reason;
    return prepared ? std::move(*prepared) : nullptr;
  }
  bool run(Transfer& transfer) {
    CHECK_OK(transfer.submit(std::nullopt));
    for (const Deadline limit = Deadline::after(60'000'000'000);;) {
      const auto state = transfer.poll();
      last_error = state ? "" : state.error().reason;
      if (!state) return false;
      if (*state == TransferState::kDone) return true;
      CHECK(!limit.passed());
      ::usleep(200);
    }
  }
  MemKind kind = MemKind::kDram;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<Connection> self;
  std::vector<std::unique_ptr<LocalRegion>> owned;
  std::vector<std::unique_ptr<RemoteRegion>> targets;
  std::string last_error;
};
std::string pattern(std::size_t size) {
  std::string bytes(size, 0);
  for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>((i * 2654435761u) >> 11);
  return bytes;
}

}  // namespace

// "GPU memory" of a library that stands in for the driver: whole objects, parts, ranges, and a copy that fails.
static void move_gpu_memory() {
  if (!env_text("NIXL_TEST_S3")) {
    std::fprintf(stderr, "  not run: NIXL_TEST_S3 is not set\n");
    return;
  }
  ::setenv("NIXL_CUDA_LIBRARY", STAND_IN, 1);
  Rig rig;
  rig.kind = MemKind::kVram;
  const std::string small = pattern(100'000), big = pattern((20 << 20) + 5), tail = pattern(9'000'001);
  std::string a = small, b = big, c = tail;
  auto write = rig.prepare(Op::kWrite, {{21, 0, &a}, {22, 0, &b}, {22, b.size(), &c}});
  CHECK(has(write->path(), "staged+http+s3"));
  if (!rig.run(*write)) check::failed(__FILE__, __LINE__, rig.last_error);
  auto read = rig.prepare(Op::kRead, {{21, 0, &a}, {22, 0, &b}, {22, b.size(), &c}});
  for (int round = 0; round < 2; ++round) {
    a.assign(a.size(), '?'), b.assign(b.size(), '?'), c.assign(c.size(), '?');
    if (!rig.run(*read)) check::failed(__FILE__, __LINE__, rig.last_error);
    CHECK(a == small && b == big && c == tail);
  }
  ::setenv("STAND_IN_FAULT", "copy", 1);
  CHECK(!rig.run(*read) && has(rig.last_error, "copy through host memory") && has(rig.last_error, "cuMemcpyAsync"));
  CHECK(!rig.run(*write) && has(rig.last_error, "PUT of object \"dir/obj 2") &&
        has(rig.last_error, "CUDA driver error 700"));
  ::setenv("STAND_IN_FAULT", "", 1);
  if (!rig.run(*write)) check::failed(__FILE__, __LINE__, rig.last_error);
}
TEST(gpu_memory_goes_through_host_buffers) {
  check::in_child(move_gpu_memory);  // first, and in a process of its own: the driver is looked for once
}

TEST(sha256_and_hmac_vectors) {
  CHECK_EQ(http::hex(sha256("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK_EQ(http::hex(sha256("abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK_EQ(http::hex(sha256(std::string(1000000, 'a'))),
           "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  CHECK_EQ(http::hex(hmac_sha256("Jefe", "what do ya want for nothing?")),
           "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
  CHECK_EQ(http::hex(hmac_sha256(std::string(131, '\xaa'), "Test Using Larger Than Block-Size Key - Hash Key First")),
           "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54");
}

TEST(signatures_published_by_aws) {
  s3::ToSign get = example("GET", "/test.txt");
  get.headers = {{"range", "bytes=0-9"}};
  CHECK_EQ(signature(get), "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41");
  s3::ToSign put = example("PUT", "/test%24file.text");
  put.headers = {{"date", "Fri, 24 May 2013 00:00:00 GMT"}, {"x-amz-storage-class", "REDUCED_REDUNDANCY"}};
  put.payload_hash = http::hex(sha256("Welcome to Amazon S3."));
  CHECK_EQ(signature(put), "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd");
  s3::ToSign lifecycle = example("GET", "/");
  lifecycle.query = {{"lifecycle", ""}};
  CHECK_EQ(signature(lifecycle), "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543");
  s3::ToSign list = example("GET", "/");
  list.query = {{"prefix", "J"}, {"max-keys", "2"}};
  CHECK_EQ(signature(list), "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7");
}

TEST(where_keys_come_from) {
  clear_environment();
  const auto none = s3::CredentialSource::open({});
  CHECK(!none && has(none.error().reason, "AWS_ACCESS_KEY_ID") && has(none.error().reason, "/nonexistent"));
  CHECK(has(s3::CredentialSource::open({{"access_key", "a"}}).error().reason, "secret_key"));

  char path[] = "/tmp/nixl_profile_XXXXXX";
  ::close(::mkstemp(path));
  std::ofstream(path) << "# comment\n[default]\naws_access_key_id = d1\naws_secret_access_key=d2\n\n[ other ]\n"
                         "aws_access_key_id=o1\naws_secret_access_key = o2\naws_session_token = o3\n";
  ::setenv("AWS_SHARED_CREDENTIALS_FILE", path, 1);
  CHECK_EQ((*CHECK_OK(s3::CredentialSource::open({})))->get().secret_key, "d2");
  ::setenv("AWS_PROFILE", "other", 1);
  CHECK_EQ((*CHECK_OK(s3::CredentialSource::open({})))->get().session_token, "o3");
  ::setenv("AWS_ACCESS_KEY_ID", "e1", 1);
  ::setenv("AWS_SECRET_ACCESS_KEY", "e2", 1);
  CHECK_EQ((*CHECK_OK(s3::CredentialSource::open({})))->get().access_key, "e1");
  CHECK_EQ((*CHECK_OK(s3::CredentialSource::open({{"access_key", "p1"}, {"secret_key", "p2"}})))->get().access_key,
           "p1");

  std::ofstream(path) << "[profile other]\nregion = eu-north-1\n";
  ::setenv("AWS_CONFIG_FILE", path, 1);
  CHECK_EQ(s3::find_region({}), "eu-north-1");
  ::setenv("AWS_REGION", "us-west-2", 1);
  CHECK_EQ(s3::find_region({}), "us-west-2");
  CHECK_EQ(s3::find_region({{"region", "ap-east-1"}}), "ap-east-1");
  ::unlink(path);
  clear_environment();
}

TEST(parameters) {
  clear_environment();
  const Params keys = {{"bucket", "b"}, {"access_key", "a"}, {"secret_key", "SECRET"}};
  const auto with = [&](const char* key, const char* value) {
    Params params = keys;
    params[key] = value;
    return params;
  };
  CHECK(has(refusal({}), "AWS_DEFAULT_BUCKET"));
  CHECK(has(refusal({{"bucket", "b"}}), "credentials"));
  CHECK(has(refusal(with("scheme", "ftp")), "scheme"));
  CHECK(has(refusal(with("req_checksum", "never")), "req_checksum"));
  CHECK(has(refusal(with("num_threads", "two")), "num_threads"));
  CHECK(has(refusal(with("crtMinLimit", "-1")), "crtMinLimit"));
  CHECK(has(refusal(with("ca_bundle", "/nonexistent.pem")), "ca_bundle"));
  CHECK(has(refusal(with("accelerated", "true")), "libcuobjclient.so"));
  CHECK(has(refusal(with("endpoint_override", "ftp://x")), "endpoint_override"));
  const std::string nobody = refusal(with("endpoint_override", "http://127.0.0.1:1"));
  CHECK(has(nobody, "127.0.0.1:1") && nobody.find("SECRET") == std::string::npos);
}

TEST(transfers) {
  if (!env_text("NIXL_TEST_S3")) {
    std::fprintf(stderr, "  not run: NIXL_TEST_S3 is not set\n");
    return;
  }
  Rig rig;
  std::string small = pattern(100'000), big = pattern(100 << 20), a = small, b = big;
  auto write = rig.prepare(Op::kWrite, {{1, 0, &small}, {2, 0, &big}});
  if (!rig.run(*write)) check::failed(__FILE__, __LINE__, rig.last_error);
  a.assign(a.size(), '?');
  b.assign(b.size(), '?');
  auto read = rig.prepare(Op::kRead, {{1, 0, &a}, {2, 0, &b}});
  if (!rig.run(*read)) check::failed(__FILE__, __LINE__, rig.last_error);
  CHECK(a == small && b == big);
  std::string middle(70'000'001, '?');
  auto part = rig.prepare(Op::kRead, {{2, 12'345'678, &middle}});
  CHECK(rig.run(*part));
  CHECK(std::memcmp(middle.data(), big.data() + 12'345'678, middle.size()) == 0);

  auto beyond = rig.prepare(Op::kRead, {{1, 50'000, &a}});
  CHECK(!rig.run(*beyond) && has(rig.last_error, "dir/obj 1") && has(rig.last_error, "ends at byte 100000"));
  auto missing = rig.prepare(Op::kRead, {{7, 0, &a}});
  CHECK(!rig.run(*missing) && has(rig.last_error, "404") && has(rig.last_error, "NoSuchKey") &&
        has(rig.last_error, "dir/obj 7"));
  CHECK(!rig.prepare(Op::kWrite, {{3, 5, &a}}) && has(rig.last_error, "offset 5"));

  // Two halves of one object, the second first.
  std::string left = pattern(1000), right = pattern(500), both(1500, '?');
  auto halves = rig.prepare(Op::kWrite, {{4, 1000, &right}, {4, 0, &left}});
  CHECK(rig.run(*halves));
  CHECK(rig.run(*rig.prepare(Op::kRead, {{4, 0, &both}})));
  CHECK(both == left + right);

  const Region asked[] = {
      {MemKind::kObject, 0, 0, 0, "dir/obj 1"}, {MemKind::kObject, 0, 0, 0, "none"}, {MemKind::kObject, 0, 0, 0, ""}};
  const auto answers = *CHECK_OK(rig.backend->memory_query()->query(asked));
  CHECK(answers[0] && !answers[1] && !answers[2]);

  const auto clash = rig.backend->add_region({MemKind::kObject, 0, 0, 1, "another key"});
  CHECK(!clash && clash.error().code == Code::kInvalidArgument && has(clash.error().reason, "another key"));

  CHECK_OK(write->submit(std::nullopt));
  for (const Deadline limit = Deadline::after(10'000'000'000); !write->cancel();) CHECK(!limit.passed());
  CHECK(!write->poll() && write->poll().error().code == Code::kCancelled);
}

TEST(damaged_profiles_are_read_and_no_more) {
  char path[] = "/tmp/nixl_profile_XXXXXX";
  const int file = ::mkstemp(path);
  check::fuzz("[default]\naws_access_key_id = AK\n; comment\n[profile other]\naws_secret_access_key=x=y\n",
              [&](const std::string& text) {
                CHECK_EQ(::pwrite(file, text.data(), text.size(), 0), static_cast<ssize_t>(text.size()));
                CHECK_EQ(::ftruncate(file, static_cast<off_t>(text.size())), 0);
                for (const char* profile : {"default", "profile other"})
                  for (const auto& [key, value] : s3::profile_section(path, profile))
                    CHECK(key.size() + value.size() < text.size());
              });
  ::close(file);
  ::unlink(path);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
