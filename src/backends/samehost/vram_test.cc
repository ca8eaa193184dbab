// GPU memory between two real processes: every kind of allocation, both operations, odd sizes and alignments, mixed
// with host memory. The second process uses another GPU where there is one. Skips without a GPU.
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "vram_peer.h"

using namespace vram_peer;

namespace {

struct Block {
  std::size_t local, remote, bytes;
};

// Blocks that overlap on neither side, in random order, each inside its own cell with room to be misaligned.
std::vector<Block> random_blocks(std::mt19937& random, std::size_t cell, bool odd) {
  const std::size_t count = std::min<std::size_t>(kBytes / cell, 20000);
  std::vector<std::size_t> here(count), there(count);
  std::iota(here.begin(), here.end(), 0);
  std::iota(there.begin(), there.end(), 0);
  std::shuffle(here.begin(), here.end(), random);
  std::shuffle(there.begin(), there.end(), random);
  std::vector<Block> blocks;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t a = odd ? random() % std::min<std::size_t>(cell / 2, 64) : 0,
                      b = odd ? random() % std::min<std::size_t>(cell / 2, 64) : 0;
    const std::size_t bytes = odd ? 1 + random() % (cell - std::max(a, b)) : cell;
    blocks.push_back({here[i] * cell + a, there[i] * cell + b, bytes});
  }
  return blocks;
}

void check_pair(char local_kind, char remote_kind) {
  mirror =
      static_cast<char*>(::mmap(nullptr, kBytes + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  CHECK(mirror != MAP_FAILED);
  Target target(remote_kind);
  const auto* words = reinterpret_cast<const std::uint64_t*>(mirror + kBytes);
  const Region far{static_cast<MemKind>(words[0]), words[1], kBytes, words[2], ""};
  auto backend = open_backend("initiator");
  std::vector<char> host(kBytes), wanted(kBytes);
  char* const memory = local_kind == 'h' ? host.data() : allocate(local_kind, 0);
  const Region near{local_kind == 'h' ? MemKind::kDram : MemKind::kVram, at(memory), kBytes, 0, ""};
  auto own = std::move(*CHECK_OK(backend->add_region(near)));
  auto peer = std::move(*CHECK_OK(backend->connect({"target", 1}, target.connection)));
  auto theirs = std::move(*CHECK_OK(backend->import_region(*peer, far, target.key)));
  std::mt19937 random(3);
  struct {
    std::size_t cell;
    bool odd;
  } const shapes[] = {{64, true},      {4096, false},     {5000, true},   {65536, false},
                      {1 << 20, true}, {16 << 20, false}, {kBytes, false}};
  for (const auto& shape : shapes)
    for (const Op op : {Op::kWrite, Op::kRead}) {
      const auto blocks = random_blocks(random, shape.cell, shape.odd);
      const std::size_t salt = random();
      for (std::size_t i = 0; i < kBytes; ++i) {
        host[i] = static_cast<char>(i * 31 + i / 251 + salt);
        mirror[i] = static_cast<char>(i * 7 + i / 4099 + salt);
      }
      target.ask('w');
      if (local_kind != 'h') CUDA(::cudaMemcpy(memory, host.data(), kBytes, cudaMemcpyHostToDevice));
      std::memcpy(wanted.data(), op == Op::kWrite ? mirror : host.data(), kBytes);
      Plan plan;
      plan.op = op;
      plan.local_kind = near.kind;
      plan.remote_kind = far.kind;
      plan.peer = peer.get();
      plan.local_regions = {own.get()};
      plan.remote_regions = {theirs.get()};
      for (const Block& block : blocks) {
        plan.local_address.push_back(near.address + block.local);
        plan.remote_address.push_back(far.address + block.remote);
        plan.length.push_back(block.bytes);
        plan.local_region.push_back(0);
        plan.remote_region.push_back(0);
        plan.total_bytes += block.bytes;
        if (op == Op::kWrite)
          std::memcpy(wanted.data() + block.remote, host.data() + block.local, block.bytes);
        else
          std::memcpy(wanted.data() + block.local, mirror + block.remote, block.bytes);
      }
      plan.num_blocks = blocks.size();
      auto transfer = std::move(*CHECK_OK(backend->prepare(std::move(plan))));
      for (int repeat = 0; repeat < 3; ++repeat) {
        auto state = CHECK_OK(transfer->submit(std::nullopt));
        while (*state == TransferState::kRunning) state = CHECK_OK(transfer->poll());
      }
      if (op == Op::kWrite) {
        target.ask('r');
        CHECK(!std::memcmp(mirror, wanted.data(), kBytes));
      } else {
        if (local_kind != 'h') CUDA(::cudaMemcpy(host.data(), memory, kBytes, cudaMemcpyDeviceToHost));
        CHECK(!std::memcmp(host.data(), wanted.data(), kBytes));
      }
      if (shape.cell == 4096 && op == Op::kWrite)
        std::fprintf(stderr, "  %c -> %c: %s\n", local_kind, remote_kind, transfer->path().c_str());
    }
  if (remote_kind != 'h' && local_kind != 'h') {  // killed while the list runs: an error, and no fault on the device
    Plan plan;
    plan.local_kind = plan.remote_kind = MemKind::kVram;
    plan.peer = peer.get();
    plan.local_regions = {own.get()};
    plan.remote_regions = {theirs.get()};
    plan.local_address = {near.address}, plan.remote_address = {far.address}, plan.length = {kBytes};
    plan.local_region = plan.remote_region = {0};
    plan.num_blocks = 1, plan.total_bytes = kBytes;
    auto transfer = std::move(*CHECK_OK(backend->prepare(std::move(plan))));
    Result<TransferState> state = TransferState::kDone;
    for (int i = 0; i < 2000 && state; ++i) {
      if (i == 20) ::kill(target.pid, SIGKILL);
      state = transfer->submit("m");
      while (state && *state == TransferState::kRunning) state = transfer->poll();
    }
    CHECK(!state && state.error().code == Code::kPeerLost);
    CUDA(::cudaDeviceSynchronize());
  }
  ::munmap(mirror, kBytes + 4096);
}

// Each pair in a process of its own: CUDA does not survive a fork.
void in_own_process(char local_kind, char remote_kind) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    check_pair(local_kind, remote_kind);
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  CHECK_EQ(status, 0);
}

}  // namespace

TEST(plain_memory) {
  need_gpu(), in_own_process('p', 'p');
}
TEST(virtual_memory) {
  need_gpu(), in_own_process('v', 'v');
}
TEST(expandable_segments) {
  need_gpu(), in_own_process('e', 'e');
}
TEST(mixed_allocators) {
  need_gpu(), in_own_process('p', 'e');
}
TEST(host_to_gpu) {
  need_gpu(), in_own_process('h', 'p');
}
TEST(gpu_to_host) {
  need_gpu(), in_own_process('e', 'h');
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
