#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/bytes.h"
#include "base/clock.h"
#include "base/env.h"
#include "base/fd.h"
#include "base/fork.h"
#include "base/log.h"
#include "base/recycled.h"
#include "check.h"
#include "fuzz.h"

using namespace nixl::core;

namespace {
Result<int> half(int value) {
  if (value % 2) return fail(Code::kInvalidArgument, "half of %d: an even number is needed", value);
  return value / 2;
}
Result<int> quarter(int value) {
  NIXL_ASSIGN(const int h, half(value));
  NIXL_ASSIGN(const int q, half(h));
  return q;
}
}  // namespace

TEST(result_carries_reason) {
  CHECK_EQ(*quarter(12), 3);
  const auto bad = quarter(6);
  CHECK(!bad);
  CHECK(bad.error().code == Code::kInvalidArgument);
  CHECK_EQ(bad.error().reason, "half of 3: an even number is needed");
  CHECK_EQ(within("quarter", bad.error()).reason, "quarter: half of 3: an even number is needed");
  CHECK_EQ(errno_text(ENOSPC), "No space left on device (ENOSPC, 28)");
}

TEST(recycled_arrays) {
  const std::uint64_t* kept = nullptr;
  {
    RecycledVector<std::uint64_t> values(100'000, 7);
    kept = values.data();
  }
  RecycledVector<std::uint64_t> again;
  again.resize(99'000);  // of the same size class: the block comes back as it was but for its first word
  CHECK(again.data() == kept);
  CHECK_EQ(again[50'000], 7u);
  const RecycledVector<std::uint64_t> other(99'000, 1), small(10, 2), large(5'000'000, 3);
  CHECK(other.data() != again.data());
  CHECK_EQ(again[50'000] + other[98'999] + small[9] + large[4'999'999], 7u + 1 + 2 + 3);
  std::vector<RecycledVector<std::uint64_t>> many;  // more than is kept
  for (std::size_t i = 0; i < 2 * kMostKept / (8 << 20); ++i) many.emplace_back(1 << 20, i);
  for (std::size_t i = 0; i < many.size(); ++i) CHECK_EQ(many[i].front() + many[i].back(), 2 * i);
}

TEST(deadline) {
  CHECK(Deadline::passed_already().passed());
  CHECK(!Deadline::never().passed());
  CHECK(!Deadline::after(INT64_MAX).passed());
  const auto soon = Deadline::after(2'000'000);
  CHECK(soon.left() <= 2'000'000);
  while (!soon.passed()) {
  }
  CHECK_EQ(soon.left(), 0);
  CHECK_EQ(soon.left_ms(), 0);
  CHECK_EQ(Deadline::never().left_ms(50), 50);
}

TEST(bytes_refuse_what_is_too_short_or_too_long) {
  ByteWriter w;
  w.put<std::uint64_t>(0x1122334455667788);
  w.put_text("rank");
  ByteReader r(w.bytes());
  CHECK_EQ(*r.get<std::uint64_t>(), 0x1122334455667788u);
  CHECK_EQ(*r.get_text(16), "rank");
  CHECK(!r.get<std::uint8_t>());
  for (size_t cut = 0; cut < w.bytes().size(); ++cut) {
    ByteReader t(std::string_view(w.bytes()).substr(0, cut));
    const auto number = t.get<std::uint64_t>();
    CHECK(!number || !t.get_text(16));
  }
  ByteReader limited(std::string_view(w.bytes()).substr(8));
  const auto over = limited.get_text(3);
  CHECK(!over && over.error().code == Code::kMismatch);
  CHECK_EQ(crc32c("123456789"), 0xe3069283u);
}

TEST(sealed_bytes_tell_damage) {
  check::fuzz(sealed("content"), [](const std::string& bytes) { (void)unsealed(bytes, "UCX"); });
  for (check::Fuzz fuzz; fuzz.more();) {  // up to three changed bits are always told
    std::string bytes = sealed("content");
    for (auto flips = 1 + fuzz.random() % 3; flips; --flips)
      bytes[fuzz.random() % bytes.size()] ^= static_cast<char>(1 << fuzz.random() % 8);
    CHECK(bytes == sealed("content") || !unsealed(bytes, "UCX"));
  }
  const std::string bytes = sealed("content");
  CHECK_EQ(std::string(*CHECK_OK(unsealed(bytes, "UCX"))), "content");
}

TEST(environment_words) {
  setenv("NIXL_TEST_WORD", "Yes", 1);
  CHECK(**env_bool("NIXL_TEST_WORD"));
  setenv("NIXL_TEST_WORD", "maybe", 1);
  CHECK(!env_bool("NIXL_TEST_WORD"));
  setenv("NIXL_TEST_WORD", "12x", 1);
  CHECK(!env_int("NIXL_TEST_WORD"));
  setenv("NIXL_TEST_WORD", "-12", 1);
  CHECK_EQ(**env_int("NIXL_TEST_WORD"), -12);
  unsetenv("NIXL_TEST_WORD");
  CHECK(!*env_bool("NIXL_TEST_WORD"));
  CHECK(parse_words(" a,b c,, ") == (std::vector<std::string>{"a", "b", "c"}));
  CHECK(parse_words("").empty() && parse_words(", ,").empty());
}

TEST(fd_closes_once) {
  int ends[2];
  CHECK_EQ(pipe(ends), 0);
  Fd write_end(ends[1]);
  {
    Fd read_end(ends[0]);
    const Fd copy = *CHECK_OK(read_end.duplicate());
    CHECK(copy.get() != read_end.get());
    Fd moved = std::move(read_end);
    CHECK(!read_end && moved);
  }
  CHECK_EQ(fcntl(ends[0], F_GETFD), -1);
}

// Exit code of a child that runs `body`.
template <typename Body>
int in_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int status = -1;
  CHECK_EQ(::waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(a_child_knows_what_its_parent_made) {
  const Birthplace here;
  CHECK(!here.is_elsewhere());
  CHECK_EQ(in_child([&] {
             const Birthplace own;
             return here.is_elsewhere() && !own.is_elsewhere() ? 0 : 1;
           }),
           0);
  CHECK(!here.is_elsewhere());
}

TEST(children_close_what_is_marked_and_nothing_else) {
  int pair[2];
  CHECK_EQ(::socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
  Fd kept(::open("/dev/null", O_RDONLY));
  const auto is_open = [](int fd) { return ::fcntl(fd, F_GETFD) >= 0; };
  const auto children_hold = [&](int fd) { return in_child([&] { return is_open(fd) ? 1 : 0; }) == 1; };
  CHECK(children_hold(pair[0]));
  {
    ClosedInChildren mark(pair[0]);
    ClosedInChildren other(pair[1]);
    CHECK(!children_hold(pair[0]) && !children_hold(pair[1]) && children_hold(kept.get()));
    const ClosedInChildren moved = std::move(mark);
    other = ClosedInChildren();
    CHECK(!children_hold(pair[0]) && children_hold(pair[1]));
    CHECK(is_open(pair[0]));
  }
  CHECK(children_hold(pair[0]));
  ::close(pair[0]);
  ::close(pair[1]);
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
