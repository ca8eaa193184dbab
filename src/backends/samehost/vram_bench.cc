// Transfers of GPU memory between two processes as the backend itself does them, post to done: GB/s by allocator, list
// and operation, with what preparing and posting cost. Prints one JSON object. NIXL_SAME_HOST_GPU_BLOCKS sets the share
// of the GPU.
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "base/clock.h"
#include "vram_peer.h"

using namespace vram_peer;

namespace {

struct Case {
  std::size_t count, bytes;
};

void measure(char kind, const char* what, int& printed) {
  mirror = static_cast<char*>(
      ::mmap(nullptr, kBytes + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  CHECK(mirror != MAP_FAILED);
  Target target(kind);
  const auto* words = reinterpret_cast<const std::uint64_t*>(mirror + kBytes);
  const Region far{MemKind::kVram, words[1], kBytes, words[2], ""};
  auto backend = open_backend("initiator");
  char* const memory = allocate(kind, 0);
  const Region near{MemKind::kVram, at(memory), kBytes, 0, ""};
  auto own = std::move(*CHECK_OK(backend->add_region(near)));
  auto peer = std::move(*CHECK_OK(backend->connect({"target", 1}, target.connection)));
  auto theirs = std::move(*CHECK_OK(backend->import_region(*peer, far, target.key)));
  std::mt19937 random(1);
  for (const Case& list :
       {Case{1, kBytes}, Case{1000, 65536}, Case{10'000, 16384}, Case{100'000, 4096}, Case{100'000, 1024}, Case{1, 64}})
    for (const Op op : {Op::kWrite, Op::kRead}) {
      std::vector<std::size_t> here(list.count), there(list.count);
      for (auto* side : {&here, &there}) {
        std::iota(side->begin(), side->end(), 0);
        std::shuffle(side->begin(), side->end(), random);
      }
      double prepare_ms = 1e9, post_us = 1e9;
      std::vector<double> seconds;
      for (int made = 0; made < 3; ++made) {
        Plan plan;
        plan.op = op;
        plan.local_kind = plan.remote_kind = MemKind::kVram;
        plan.peer = peer.get();
        plan.local_regions = {own.get()};
        plan.remote_regions = {theirs.get()};
        for (std::size_t i = 0; i < list.count; ++i) {
          plan.local_address.push_back(near.address + here[i] * list.bytes);
          plan.remote_address.push_back(far.address + there[i] * list.bytes);
        }
        plan.length.assign(list.count, list.bytes);
        plan.local_region.assign(list.count, 0);
        plan.remote_region.assign(list.count, 0);
        plan.num_blocks = list.count;
        plan.total_bytes = list.count * list.bytes;
        const Nanoseconds start = now_ns();
        auto transfer = std::move(*CHECK_OK(backend->prepare(std::move(plan))));
        prepare_ms = std::min(prepare_ms, (now_ns() - start) / 1e6);
        for (int i = 0; i < 15; ++i) {
          const Nanoseconds posted = now_ns();
          auto state = transfer->submit(std::nullopt);
          post_us = std::min(post_us, (now_ns() - posted) / 1e3);
          while (state && *state == TransferState::kRunning) state = transfer->poll();
          CHECK_OK(state);
          seconds.push_back((now_ns() - posted) / 1e9);
        }
      }
      std::sort(seconds.begin(), seconds.end());
      const double median = seconds[seconds.size() / 2];
      std::printf("%s\"%s %zux%zu %s\": {\"GB/s\": %.2f, \"us\": %.2f, \"prepare_ms\": %.3f, \"post_us\": %.2f}",
                  printed++ ? ",\n " : "{", what, list.count, list.bytes, op == Op::kWrite ? "WRITE" : "READ",
                  static_cast<double>(list.count * list.bytes) / median / 1e9, median * 1e6, prepare_ms, post_us);
      std::fflush(stdout);
    }
}

}  // namespace

int main() {
  need_gpu();
  kBytes = std::size_t{1} << 30;
  int printed = 0;
  for (const auto& [kind, what] : {std::pair{'p', "plain"}, std::pair{'v', "virtual"}, std::pair{'e', "expandable"}}) {
    // One process an allocator: CUDA does not survive the fork that makes the second process.
    std::fflush(stdout);
    const pid_t pid = ::fork();
    if (pid == 0) {
      measure(kind, what, printed);
      std::fflush(stdout);
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(pid, &status, 0);
    if (status != 0) return 1;
    ++printed;
  }
  std::printf("}\n");
}
