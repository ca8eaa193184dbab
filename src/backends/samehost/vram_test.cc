// GPU memory between two real processes: every kind of allocation, both operations, odd sizes and alignments, mixed
// with host memory. The second process uses another GPU where there is one. Skips without a GPU.
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "backends/samehost/shared_memory.h"
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

bool is_host(char kind) {
  return std::strchr("hcrsu", kind) != nullptr;
}

// kBytes of memory of ours: GPU memory as allocate() has it, 'h' malloc, 'c' cudaHostAlloc, 'r' two neighbouring
// stretches, each page-locked by a call of its own.
char* near_memory(char kind) {
  if (!is_host(kind)) return allocate(kind, 0);
  void* memory = nullptr;
  if (kind == 'c') {
    CUDA(::cudaHostAlloc(&memory, kBytes, cudaHostAllocDefault));
    return static_cast<char*>(memory);
  }
  memory = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  if (kind == 'r')
    for (int half = 0; half < 2; ++half)
      CUDA(::cudaHostRegister(static_cast<char*>(memory) + half * (kBytes / 2), kBytes / 2, cudaHostRegisterDefault));
  return static_cast<char*>(memory);
}

// Both processes, connected; the far memory imported twice.
struct Link {
  Link(char local_kind, char remote_kind) : memory(nullptr), local_kind(local_kind) {
    mirror =
        static_cast<char*>(::mmap(nullptr, kBytes + 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    CHECK(mirror != MAP_FAILED);
    target = std::make_unique<Target>(remote_kind);
    const auto* words = reinterpret_cast<const std::uint64_t*>(mirror + kBytes);
    far = {static_cast<MemKind>(words[0]), words[1], kBytes, words[2], ""};
    backend = open_backend("initiator");
    memory = near_memory(local_kind);
    near = {is_host(local_kind) ? MemKind::kDram : MemKind::kVram, at(memory), kBytes, 0, ""};
    own = std::move(*CHECK_OK(backend->add_region(near)));
    peer = std::move(*CHECK_OK(backend->connect({"target", 1}, target->connection)));
    theirs = std::move(*CHECK_OK(backend->import_region(*peer, far, target->key)));
    spare = std::move(*CHECK_OK(backend->import_region(*peer, far, target->spare_key)));
  }
  std::unique_ptr<Transfer> prepare(Op op, const std::vector<Block>& blocks, bool on_spare = false) {
    Plan plan;
    plan.op = op;
    plan.local_kind = near.kind;
    plan.remote_kind = far.kind;
    plan.peer = peer.get();
    plan.local_regions = {own.get()};
    plan.remote_regions = {on_spare ? spare.get() : theirs.get()};
    for (const Block& block : blocks) {
      plan.local_address.push_back(near.address + block.local);
      plan.remote_address.push_back(far.address + block.remote);
      plan.length.push_back(block.bytes);
      plan.local_region.push_back(0);
      plan.remote_region.push_back(0);
      plan.total_bytes += block.bytes;
    }
    plan.num_blocks = blocks.size();
    return std::move(*CHECK_OK(backend->prepare(std::move(plan))));
  }
  // Into or from memory of ours, whatever it is.
  void set(const std::vector<char>& values) {
    if (is_host(local_kind))
      std::memcpy(memory, values.data(), kBytes);
    else
      CUDA(::cudaMemcpy(memory, values.data(), kBytes, cudaMemcpyDefault));
  }
  std::vector<char> get() {
    std::vector<char> values(kBytes);
    if (is_host(local_kind))
      std::memcpy(values.data(), memory, kBytes);
    else
      CUDA(::cudaMemcpy(values.data(), memory, kBytes, cudaMemcpyDefault));
    return values;
  }

  char* memory;
  const char local_kind;
  std::unique_ptr<Target> target;
  Region near, far;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<LocalRegion> own;
  std::unique_ptr<Connection> peer;
  std::unique_ptr<RemoteRegion> theirs, spare;
};

Result<TransferState> run(Transfer& transfer) {
  auto state = transfer.submit("m");
  while (state && *state == TransferState::kRunning) state = transfer.poll();
  return state;
}

// All of the memory as one piece (the copy engine's), and as a list (the kernel's).
const std::vector<Block> kWhole{{0, 0, kBytes}};
std::vector<Block> list_of(std::size_t cell) {
  std::vector<Block> blocks;
  for (std::size_t at = 0; at < kBytes; at += cell) blocks.push_back({at, kBytes - cell - at, cell});
  return blocks;
}

// Enough random bytes for both sides, each taken from another place every time.
std::vector<char> make_noise() {
  std::vector<char> noise(kBytes * 3 / 2);
  std::mt19937_64 random(5);
  for (std::size_t at = 0; at < noise.size(); at += 8) {
    const std::uint64_t value = random();
    std::memcpy(noise.data() + at, &value, 8);
  }
  return noise;
}

void check_bytes(Link& link, const char* path) {
  std::vector<char> host(kBytes), wanted(kBytes);
  std::mt19937 random(3);
  const std::vector<char> noise = make_noise();
  struct {
    std::size_t cell;
    bool odd;
  } const shapes[] = {{64, true},      {4096, false},     {6700, true},   {65536, false},
                      {1 << 20, true}, {16 << 20, false}, {kBytes, false}};
  for (const auto& shape : shapes)
    for (const Op op : {Op::kWrite, Op::kRead}) {
      const auto blocks = random_blocks(random, shape.cell, shape.odd);
      const std::size_t salt = random() % (kBytes / 4);
      std::memcpy(host.data(), noise.data() + salt, kBytes);
      std::memcpy(mirror, noise.data() + kBytes / 2 - salt, kBytes);
      link.target->ask('w');
      link.set(host);
      std::memcpy(wanted.data(), op == Op::kWrite ? mirror : host.data(), kBytes);
      for (const Block& block : blocks)
        if (op == Op::kWrite)
          std::memcpy(wanted.data() + block.remote, host.data() + block.local, block.bytes);
        else
          std::memcpy(wanted.data() + block.local, mirror + block.remote, block.bytes);
      const auto transfer = link.prepare(op, blocks);
      CHECK_EQ(transfer->path(), std::string(path));
      for (int repeat = 0; repeat < 3; ++repeat) CHECK_OK(run(*transfer));
      if (op == Op::kWrite) {
        link.target->ask('r');
        CHECK(!std::memcmp(mirror, wanted.data(), kBytes));
      } else {
        CHECK(link.get() == wanted);
      }
    }
}

// Deregistered under a request, then killed while copies run: errors, and no fault on the device.
void check_faults(Link& link) {
  for (const auto& blocks : {kWhole, list_of(16384)}) {
    const auto transfer = link.prepare(Op::kWrite, blocks, true);
    auto state = transfer->submit("m");
    if (state) link.target->ask('d');
    while (state && *state == TransferState::kRunning) state = transfer->poll();
    CHECK(!state && state.error().code == Code::kNotFound);
  }
  const std::unique_ptr<Transfer> transfers[] = {link.prepare(Op::kWrite, kWhole),
                                                 link.prepare(Op::kRead, list_of(16384))};
  Result<TransferState> state = TransferState::kDone;
  for (int i = 0; i < 2000 && state; ++i) {
    if (i == 20) ::kill(link.target->pid, SIGKILL);
    state = run(*transfers[i % 2]);
  }
  CHECK(!state && state.error().code == Code::kPeerLost);
  if (link.local_kind != 'h') CUDA(::cudaDeviceSynchronize());
}

// In a process of its own: CUDA does not survive a fork.
template <typename F>
void in_own_process(F body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    body();
    ::_exit(0);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  CHECK_EQ(status, 0);
}

void check_pair(char local_kind, char remote_kind, const char* path) {
  need_gpu();
  in_own_process([&] {
    Link link(local_kind, remote_kind);
    check_bytes(link, path);
    check_faults(link);
  });
}

// The path to a peer's memory file: older kernels do not tell which file memory is (docs/samehost.md).
const char* file_path() {
  int file = -1;
  char* const memory = map_file('s', file);
  const auto found = CHECK_OK(samehost::SharedMemory::open())->find({MemKind::kDram, at(memory), kBytes, 0, ""});
  ::munmap(memory, kBytes);
  ::close(file);
  return found ? "pinned+shm" : "staged+cma";
}

}  // namespace

TEST(plain_memory) {
  check_pair('p', 'p', "cuda_ipc");
}
TEST(virtual_memory) {
  check_pair('v', 'v', "cuda_vmm");
}
TEST(expandable_segments) {
  check_pair('e', 'e', "cuda_vmm");
}
TEST(mixed_allocators) {
  check_pair('p', 'e', "cuda_vmm");
}
TEST(staged_host_to_gpu) {
  check_pair('h', 'p', "staged+cma");
}
TEST(staged_gpu_to_host) {
  check_pair('e', 'h', "staged+cma");
}
TEST(locked_host_to_gpu) {
  check_pair('c', 'p', "pinned+cuda_ipc");
}
TEST(registered_host_to_gpu) {
  check_pair('r', 'e', "pinned+cuda_vmm");
}
TEST(gpu_to_host_file) {
  check_pair('p', 's', file_path());
}
TEST(host_and_gpu_of_one_process) {
  need_gpu();
  in_own_process([] {
    auto here = open_backend("here"), there = open_backend("there");
    char *const gpu = allocate('p', 0), *const host = near_memory('c');
    const Region near{MemKind::kVram, at(gpu), kBytes, 0, ""}, far{MemKind::kDram, at(host), kBytes, 0, ""};
    const auto own = std::move(*CHECK_OK(here->add_region(near))), other = std::move(*CHECK_OK(there->add_region(far)));
    const auto peer = std::move(*CHECK_OK(here->connect({"there", 1}, *CHECK_OK(there->export_connection()))));
    const auto theirs = std::move(*CHECK_OK(here->import_region(*peer, far, *CHECK_OK(there->export_region(*other)))));
    CUDA(::cudaMemset(gpu, 7, kBytes));
    Plan plan = nixl::core::test::plan_between(Op::kWrite, *peer, *own, *theirs);
    plan.local_kind = near.kind;
    plan.remote_kind = far.kind;
    for (std::size_t at = 0; at < kBytes; at += 4096)
      nixl::core::test::add_block(plan, near.address + at, far.address + at, 4095);
    std::memset(host, 1, kBytes);
    const auto transfer = std::move(*CHECK_OK(here->prepare(std::move(plan))));
    CHECK_EQ(transfer->path(), std::string("pinned"));
    CHECK_OK(run(*transfer));
    for (std::size_t i = 0; i < kBytes; ++i) CHECK_EQ(static_cast<int>(host[i]), i % 4096 == 4095 ? 1 : 7);
  });
}
TEST(host_direct_switched_off) {
  need_gpu();
  in_own_process([] {
    ::setenv("NIXL_SAME_HOST_DIRECT", "n", 1);
    Link link('c', 'p');
    CHECK_EQ(link.prepare(Op::kWrite, kWhole)->path(), std::string("staged+cma"));
  });
}
TEST(host_unlocked_under_a_request) {
  need_gpu();
  in_own_process([] {
    Link link('r', 'p');
    const auto list = list_of(16384);
    const std::unique_ptr<Transfer> transfers[] = {link.prepare(Op::kWrite, kWhole), link.prepare(Op::kRead, list)};
    CUDA(::cudaHostUnregister(link.memory + kBytes / 2));
    const std::vector<char> noise = make_noise(), near(noise.begin(), noise.begin() + kBytes);
    link.set(near);
    CHECK_OK(run(*transfers[0]));
    CHECK_EQ(transfers[0]->path(), std::string("staged+cma"));
    link.target->ask('r');
    CHECK(!std::memcmp(mirror, near.data(), kBytes));
    CHECK_OK(run(*transfers[1]));
    CHECK_EQ(transfers[1]->path(), std::string("staged+cma"));
    for (const Block& block : list) CHECK(!std::memcmp(link.memory + block.local, mirror + block.remote, block.bytes));
    CHECK_EQ(link.prepare(Op::kRead, list)->path(), std::string("staged+cma"));
    CUDA(::cudaHostRegister(link.memory + kBytes / 2, kBytes / 2, cudaHostRegisterDefault));
    const auto anew = link.prepare(Op::kRead, list);
    CHECK_EQ(anew->path(), std::string("pinned+cuda_ipc"));
    CHECK_OK(run(*anew));
    CUDA(::cudaDeviceSynchronize());
  });
}
TEST(host_unlocked_under_a_copy) {
  need_gpu();
  in_own_process([] {
    Link link('r', 'p');
    for (const auto& blocks : {kWhole, list_of(16384)})
      for (const Op op : {Op::kWrite, Op::kRead}) {
        const auto transfer = link.prepare(op, blocks);
        auto state = transfer->submit("m");
        CUDA(::cudaHostUnregister(link.memory));  // the driver waits for the copy
        while (state && *state == TransferState::kRunning) state = transfer->poll();
        CHECK_OK(state);
        CUDA(::cudaDeviceSynchronize());
        CUDA(::cudaHostRegister(link.memory, kBytes / 2, cudaHostRegisterDefault));
      }
  });
}
TEST(host_unmapped_under_a_request) {
  need_gpu();
  in_own_process([] {
    Link link('r', 'p');
    const auto list = list_of(16384);
    const std::unique_ptr<Transfer> transfers[] = {link.prepare(Op::kWrite, kWhole), link.prepare(Op::kRead, list)};
    auto state = transfers[1]->submit("m");
    CHECK_EQ(::munmap(link.memory, kBytes), 0);
    while (state && *state == TransferState::kRunning) state = transfers[1]->poll();
    CHECK(!state && state.error().code == Code::kIo);
    for (const auto& transfer : transfers) {
      state = run(*transfer);
      CHECK(!state && state.error().code == Code::kIo);
    }
    CUDA(::cudaDeviceSynchronize());
  });
}
TEST(host_file_truncated_under_a_request) {
  need_gpu();
  if (std::string(file_path()) == "staged+cma") {
    std::fprintf(stderr, "  SKIP: this kernel does not tell which file memory is (Linux 6.11)\n");
    return;
  }
  in_own_process([] {
    ::setenv("NIXL_SAME_HOST_MAP", "y", 1);
    Link link('p', 'u');
    const std::unique_ptr<Transfer> transfers[] = {link.prepare(Op::kWrite, kWhole),
                                                   link.prepare(Op::kRead, list_of(16384))};
    CHECK_EQ(transfers[0]->path(), std::string("pinned+shm"));
    for (const auto& transfer : transfers) CHECK_OK(run(*transfer));
    link.target->ask('t');
    for (const auto& transfer : transfers) CHECK_OK(run(*transfer));  // page-locked: the pages outlive the file
    CUDA(::cudaDeviceSynchronize());
  });
}

int main(int argc, char** argv) {
  return check::run_tests(argc, argv);
}
