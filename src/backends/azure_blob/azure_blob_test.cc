// Signatures against those that Azure's own client library makes for the same requests; configuration; requests. There
// is no server to test against: `probe` says so.
#include "backends/azure_blob/azure_blob.h"

#include <stdlib.h>

#include "backends/azure_blob/azure.h"
#include "check.h"
#include "fuzz.h"
#include "http/text.h"

using namespace nixl::core;
using namespace nixl::core::azure;

namespace {

// The development account that everybody knows.
constexpr char kAccount[] = "devstoreaccount1";
constexpr char kKey[] = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

using check::has;
std::string signature(ToSign request) {
  request.headers.push_back("x-ms-date: Sun, 06 Nov 1994 08:49:37 GMT");
  request.headers.push_back("x-ms-version: 2021-08-06");
  return authorization(request, kAccount, *CHECK_OK(http::base64_decode(kKey)));
}
std::string reason(const Params& params) {
  const auto config = read_config(params);
  CHECK(!config);
  return config.error().reason;
}
void clear_environment() {
  for (const char* name : {"AZURE_STORAGE_ACCOUNT_URL", "AZURE_STORAGE_CONTAINER_NAME",
                           "AZURE_STORAGE_CONNECTION_STRING", "AZURE_CA_BUNDLE"})
    ::unsetenv(name);
}

}  // namespace

TEST(signatures_as_azures_client_makes_them) {
  CHECK_EQ(signature({"GET", "/devstoreaccount1/c/dir/a%20b", "", 0, {"x-ms-range: bytes=5-9"}}),
           "SharedKey devstoreaccount1:4cdnEYUDUbOsP4qlI0JqJKKp60i1FMHDguWKfYRHkBg=");
  CHECK_EQ(signature({"PUT", "/devstoreaccount1/c/k", "", 1000, {"x-ms-blob-type: BlockBlob"}}),
           "SharedKey devstoreaccount1:VQQCxUXYEBfQD3DoDz+KkCi6T1u1r5C+jxIQRxBRx4w=");
  CHECK_EQ(signature({"PUT", "/devstoreaccount1/c/k", "comp=block&blockid=MDAwMDAx%3D%3D", 16, {}}),
           "SharedKey devstoreaccount1:8OXOkkBdZXMibM3NkCPSz5OZzmhh6hSRUtgclgDZzq4=");
  CHECK_EQ(signature({"PUT", "/devstoreaccount1/c/k", "comp=blocklist", 99, {"Content-Type: application/xml"}}),
           "SharedKey devstoreaccount1:yCHk2UjZRna2hiiuANjCrEbjOEL61M3SElod+EqYOPY=");
  CHECK_EQ(signature({"HEAD", "/c", "restype=container", 0, {}}),
           "SharedKey devstoreaccount1:af2ImO57HFTDnEkXLWuXoqSMFV6WUZsUjaMiz3IEFmk=");
}

TEST(configuration) {
  clear_environment();
  CHECK(has(reason({}), "AZURE_STORAGE_CONTAINER_NAME"));
  CHECK(has(reason({{"container_name", "c"}}), "AZURE_STORAGE_CONNECTION_STRING"));
  CHECK(has(reason({{"container_name", "c"}, {"account_url", "https://a.blob.core.windows.net"}}), "SAS"));
  CHECK(has(reason({{"container_name", "c"}, {"account_url", "https://a.blob.core.windows.net"}}),
            "managed identities are not supported"));
  CHECK(has(reason({{"container_name", "c"}, {"connection_string", "AccountName=a;AccountKey=???"}}), "AccountKey"));
  const std::string string =
      std::string("DefaultEndpointsProtocol=http;AccountName=acc;AccountKey=") + kKey + ";EndpointSuffix=example.org";
  const AzureConfig config = *CHECK_OK(read_config({{"container_name", "c"}, {"connection_string", string}}));
  CHECK_EQ(config.account_url, "http://acc.blob.example.org");
  CHECK_EQ(config.key, *CHECK_OK(http::base64_decode(kKey)));
  ::setenv("AZURE_STORAGE_CONTAINER_NAME", "e", 1);
  ::setenv("AZURE_STORAGE_ACCOUNT_URL", "https://h/x/?sv=1&sig=secret", 1);
  const AzureConfig sas = *CHECK_OK(read_config({}));
  CHECK(sas.container == "e" && sas.account_url == "https://h/x" && sas.sas == "sv=1&sig=secret");
  clear_environment();
}

TEST(damaged_configuration_is_refused_or_read_and_no_more) {
  clear_environment();
  const std::string string =
      std::string("DefaultEndpointsProtocol=http;AccountName=acc;AccountKey=") + kKey + ";EndpointSuffix=example.org";
  check::fuzz(string, [](const std::string& text) {
    const auto config = read_config({{"container_name", "c"}, {"connection_string", text}});
    if (config) (void)Azure(*config).get("key", 0, 1);
  });
  check::fuzz("https://h.example/x?sv=2021&sig=%41%zz", [](const std::string& text) {
    const auto config = read_config({{"container_name", "c"}, {"account_url", text}});
    if (config) (void)Azure(*config).get("key", 0, 1);
  });
}

TEST(requests) {
  const Azure azure({"https://h", "c", "", "", "sig=s"});
  const http::Call get = azure.get("dir/a b", 5, 10);
  CHECK_EQ(get.url, "https://h/c/dir/a%20b?sig=s");
  CHECK_EQ(get.headers[0], "x-ms-range: bytes=5-14");
  char bytes[] = "12345";
  const std::string upload = *CHECK_OK(azure.upload_id({}));
  CHECK(upload != *CHECK_OK(azure.upload_id({})));
  const http::Call part = azure.put_part("k", upload, 2, {{bytes, 5}});
  const std::string id = http::base64_encode(upload + "000002");
  CHECK(has(part.url, ("comp=block&blockid=" + http::percent_encode(id, false)).c_str()));
  const http::Call finish = azure.finish_upload("k", upload, {"", ""});
  CHECK(has(finish.url, "comp=blocklist") &&
        has(finish.text_body, ("<Latest>" + id + "</Latest></BlockList>").c_str()));
}

TEST(nobody_there) {
  clear_environment();
  BackendConfig config;
  config.params = {{"container_name", "c"}, {"account_url", "http://127.0.0.1:1?sig=SECRET"}};
  const auto opened = backends_of_azure_blob()[0].open(std::move(config));
  CHECK(!opened && has(opened.error().reason, "127.0.0.1:1") &&
        opened.error().reason.find("SECRET") == std::string::npos);
  CHECK(has(backends_of_azure_blob()[0].probe().reason, "untested"));
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
