// Shared memory and doorbells between threads and between processes.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "check.h"
#include "device/host/futex.h"
#include "device/host/shared_memory.h"

namespace {

using namespace nixl::core;

TEST(one_process_maps_the_same_memory_once) {
  SharedMemory owner = *CHECK_OK(SharedMemory::create("test", 10));
  SharedMemory other = *CHECK_OK(SharedMemory::import(*CHECK_OK(owner.export_descriptor())));
  CHECK(owner.data() == other.data());
  CHECK_EQ(other.size(), 4096);
}

TEST(memory_grows_under_other_handles) {
  SharedMemory owner = *CHECK_OK(SharedMemory::create("test", 4096));
  SharedMemory other = *CHECK_OK(SharedMemory::import(*CHECK_OK(owner.export_descriptor())));
  owner.data()[5] = std::byte{7};
  CHECK_OK(owner.grow(1 << 20));
  CHECK_EQ(owner.size(), 1 << 20);
  CHECK_EQ(other.size(), 4096);
  CHECK(other.data()[5] == std::byte{7});
  owner.data()[5] = std::byte{8};
  CHECK(other.data()[5] == std::byte{8});
  CHECK_OK(other.refresh());
  CHECK_EQ(other.size(), 1 << 20);
}

TEST(only_own_memory_is_imported) {
  const auto refused = SharedMemory::import(Fd(memfd_create("plain", 0)));
  CHECK(!refused && refused.error().code == Code::kMismatch);
  CHECK(!SharedMemory::create("test", 0));
}

TEST(a_doorbell_wakes_another_process) {
  SharedMemory memory = *CHECK_OK(SharedMemory::create("bell", 4096));
  auto* bells = reinterpret_cast<Doorbell*>(memory.data());
  const pid_t child = fork();
  if (child == 0) {
    const Deadline limit = Deadline::after(20'000'000'000);
    while (bells[0].rings_heard() == 0 && !limit.passed()) bells[0].sleep(0, limit);
    bells[1].ring();
    _exit(limit.passed() ? 1 : 0);
  }
  const Deadline limit = Deadline::after(20'000'000'000);
  while (bells[0].sleeping.load() == 0 && !limit.passed()) std::this_thread::yield();
  bells[0].ring();
  while (bells[1].rings_heard() == 0 && !limit.passed()) bells[1].sleep(0, limit);
  int status = 1;
  waitpid(child, &status, 0);
  CHECK_EQ(status, 0);
}

TEST(a_sleep_ends_at_its_deadline) {
  Doorbell bell;
  const Nanoseconds start = now_ns();
  const Deadline limit = Deadline::after(20'000'000);
  while (!limit.passed()) bell.sleep(0, limit);
  CHECK(now_ns() - start < 5'000'000'000);
  bell.ring();
  bell.sleep(0, Deadline::never());  // rang since: returns
}

}  // namespace

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
