// Messages that wake the peer's callers without its progress thread: two backends in one process.
#include "backends/samehost/callers_events.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "backends/samehost/test_process.h"

using namespace nixl::core;
using samehost::test::open_backend;

namespace {

struct Quiet : Events {
  void peer_lost(const PeerId&, Error) noexcept override {}
};

struct Pair {
  Pair() {
    peer = std::move(*CHECK_OK(sender->connect({"owner", 7}, *CHECK_OK(owner->export_connection()))));
    (void)drained();  // the hello
    CHECK(owner->arm() || owner->progress());
    CHECK(owner->arm());
  }
  void send(const char* text) { CHECK_OK(sender->notifier()->send(*peer, text)); }
  std::string drained() {
    std::vector<Notification> got;
    owner->notifier()->drain(got);
    std::string all;
    for (const Notification& one : got) all += one.message + ";";
    return all;
  }
  Quiet quiet;
  std::unique_ptr<Backend> sender = open_backend("sender", &quiet), owner = open_backend("owner", &quiet);
  std::unique_ptr<Connection> peer;
};

bool readable(int fd) {
  pollfd wait{fd, POLLIN, 0};
  return ::poll(&wait, 1, 0) == 1;
}

bool read_count(const Fd& fd) {
  eventfd_t count;
  return ::eventfd_read(fd.get(), &count) == 0;
}

Fd event() {
  return Fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
}

}  // namespace

TEST(callers_are_woken_and_the_owners_thread_is_not) {
  Pair pair;
  const Fd first = event(), second = event();
  pair.owner->share_callers_event(first.get());
  pair.owner->share_callers_event(first.get());  // the same again changes nothing
  pair.send("a");
  CHECK(read_count(first));
  CHECK(!readable(pair.owner->event_fd()));
  CHECK_EQ(pair.drained(), std::string("a;"));
  pair.owner->share_callers_event(second.get());
  pair.send("b");
  CHECK(read_count(first) && read_count(second));
  CHECK(!readable(pair.owner->event_fd()));
  // Callers who were told and do not look: the thread is woken to make room in the lane.
  pair.send("c");
  CHECK(!readable(first.get()) && !readable(second.get()));
  CHECK(readable(pair.owner->event_fd()));
  CHECK_EQ(pair.drained(), std::string("b;c;"));
  pair.send("d");
  CHECK(read_count(first));
  CHECK_EQ(pair.drained(), std::string("d;"));
}

TEST(a_number_that_names_another_file_by_now_is_not_written_to) {
  for (const bool event_again : {true, false}) {
    Pair pair;
    Fd shared = event();
    const Fd other = event_again ? event() : Fd(::memfd_create("other", MFD_CLOEXEC));
    pair.owner->share_callers_event(shared.get());
    CHECK_EQ(::dup2(other.get(), shared.get()), shared.get());
    pair.send("a");
    if (event_again) {
      CHECK(!readable(other.get()));
    } else {
      CHECK_EQ(::lseek(other.get(), 0, SEEK_END), 0);
    }
    CHECK(readable(pair.owner->event_fd()));
    CHECK_EQ(pair.drained(), std::string("a;"));
  }
}

TEST(more_than_the_segment_has_room_for_are_left_to_the_owners_thread) {
  Pair pair;
  std::vector<Fd> events;
  for (std::size_t i = 0; i <= samehost::kMaxCallersEvents; ++i) {
    events.push_back(event());
    pair.owner->share_callers_event(events.back().get());
  }
  for (const char* text : {"a", "b"}) {
    pair.send(text);
    for (const Fd& fd : events) CHECK(!readable(fd.get()));
    CHECK(readable(pair.owner->event_fd()));
    CHECK_EQ(pair.drained(), text + std::string(";"));
    CHECK(pair.owner->progress());
    CHECK(pair.owner->arm());
  }
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
