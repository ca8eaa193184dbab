// Times dispatch, combine and their pair on the CUDA path, twice: replayed from graphs, and as kernels that the profiler (CUPTI)
// records. Prints a table on stderr and JSON lines on stdout.
//   ep_cuda_bench [ranks] [name part]
#include <cstdio>
#include <cstdlib>

#include "bodies.h"
#include "compare.h"
#include "kernel_records.h"
#include "timing.h"

namespace gpu_test {
namespace {

constexpr int kChain = 100, kRecorded = 31, kRecordedSplits = 11;
constexpr double kSettleUs = 3, kOverlapUs = 1000;
constexpr const char* kKernelMethod =
    "kernel records of CUPTI, 31 calls queued behind a pause, a barrier of all ranks and a plain kernel of 3 us before "
    "each, so that "
    "ranks begin together and no kernel is placed early; split phases 1 ms apart, 11 calls; a rank's figure is its "
    "median, shown is "
    "the worst rank";

struct Cell {
  const char* name;
  int tokens, hidden, experts, topk, payload;
  double must;  // of the pair on 4 GPUs, us
};
std::vector<Cell> cells_of(int ranks) {
  const int experts = 32 * ranks;
  return {
      {"1 token", 1, 7168, experts, 8, 1, 12},
      {"8 tokens", 8, 7168, experts, 8, 1, 15.5},
      {"32 tokens", 32, 7168, experts, 8, 1, 20},
      {"128 tokens", 128, 7168, experts, 8, 1, 44},
      {"128 tokens, BF16", 128, 7168, experts, 8, 0, 58},
      {"256 tokens", 256, 7168, experts, 8, 1, 85},
      {"512 tokens", 512, 7168, experts, 8, 1, 165},
      {"1024 tokens", 1024, 7168, experts, 8, 1, 320},
      {"8 experts, top-k 2", 128, 7168, 8 / ranks * ranks, 2, 1, 26},
      {"16 experts, top-k 1", 128, 7168, 16 / ranks * ranks, 1, 1, 20},
      {"hidden 4096", 128, 4096, experts, 8, 1, 31},
      {"hidden 2048", 128, 2048, experts, 8, 1, 22},
  };
}

Case case_of(const Cell& cell, int ranks) {
  Case c;
  c.name = cell.name;
  c.ranks = ranks;
  c.max_tokens = cell.tokens;
  c.hidden = cell.hidden;
  c.experts = cell.experts / ranks;
  c.topk = cell.topk;
  c.payload = cell.payload;
  c.seed = 9;
  return c;
}

// A connected rank with inputs, and what the path took of the GPU's memory.
struct Rank {
  double megabytes = 0;
  std::unique_ptr<Path> path;
  Tensors t;
  Dispatch d;
  CombineArgs a, split;

  Rank(Mesh& mesh, const Case& c) : path(open(mesh, c, megabytes)), t(c, mesh.rank()) {
    t.fill_answers();
    d = t.dispatch();
    d.recv_stats = nullptr;
    d.wait_cost = nullptr;
    a = split = t.combine();
    split.sends_only = true;
    OK(path->dispatch(d));
    OK(path->combine(a));
    CUDA_OK(cudaStreamSynchronize(t.stream));
  }
  static std::unique_ptr<Path> open(Mesh& mesh, const Case& c, double& megabytes) {
    PathOptions options;
    options.rank = mesh.rank();
    options.combine = nixl::ep::Combine::kReduced;
    options.timeout_ns = 5'000'000'000;
    options.incarnation = 77 + mesh.rank();
    std::size_t before = 0, after = 0, total = 0;
    auto path = OK(open_cuda_path(options));
    CUDA_OK(cudaMemGetInfo(&before, &total));
    OK(path->reserve({c.ranks, c.experts, bytes_for(c)}));
    CUDA_OK(cudaMemGetInfo(&after, &total));
    megabytes = static_cast<double>(before - after) / 1e6;
    connect(*path, mesh, options.incarnation);
    return path;
  }
  void close(Mesh& mesh) {
    CHECK_EQ(path->take_faults().size(), std::size_t(0));
    mesh.barrier();
    OK(path->close());
    mesh.barrier();
  }
};

void print_head(const char* kind, const Case& c) {
  std::printf(
      "{\"kind\":\"%s\",\"case\":\"%s\",\"ranks\":%d,\"tokens\":%d,\"hidden\":%d,\"experts\":%d,\"topk\":%d,"
      "\"payload\":%d",
      kind, c.name, c.ranks, c.max_tokens, c.hidden, c.experts * c.ranks, c.topk, c.payload);
}

void time_replays(Mesh& mesh, const Cell& cell) {
  const Case c = case_of(cell, mesh.size());
  Rank rank(mesh, c);
  Path& path = *rank.path;
  const auto worst_time = [&](const std::function<void()>& step) {
    return mesh.worst(time_chain(mesh, rank.t.stream, kChain, step));
  };
  const double dispatch = worst_time([&] { OK(path.dispatch(rank.d)); });
  const double combine = worst_time([&] { OK(path.combine(rank.a)); });
  const double pair = worst_time([&] {
    OK(path.dispatch(rank.d));
    OK(path.combine(rank.a));
  });
  const double split_dispatch = worst_time([&] {
    OK(path.dispatch_send(rank.d));
    OK(path.dispatch_recv(rank.d));
  });
  const double split_combine = worst_time([&] {
    OK(path.combine_send(rank.split));
    OK(path.combine_recv(rank.split));
  });
  const double megabytes = mesh.worst(rank.megabytes);
  const Traffic own = traffic_of(c, mesh.rank());
  const double dispatch_bytes = mesh.worst(own.dispatch_link), combine_bytes = mesh.worst(own.combine_link);
  if (mesh.rank() == 0) {
    const bool judged = mesh.size() == 4;
    std::fprintf(stderr, "%-24s d %7.2f  c %7.2f  pair %7.2f  must %5.1f %-6s split d %7.2f c %7.2f  memory %5.0f MB\n",
                 cell.name, dispatch, combine, pair, judged ? cell.must : 0,
                 !judged             ? "none"
                 : pair <= cell.must ? "met"
                                     : "missed",
                 split_dispatch, split_combine, megabytes);
    print_head("replayed", c);
    std::printf(
        ",\"dispatch_us\":%.2f,\"combine_us\":%.2f,\"pair_us\":%.2f,\"split_dispatch_us\":%.2f,\"split_combine_us\":%."
        "2f,"
        "\"memory_mb\":%.0f,\"dispatch_link_bytes\":%.0f,\"combine_link_bytes\":%.0f",
        dispatch, combine, pair, split_dispatch, split_combine, megabytes, dispatch_bytes, combine_bytes);
    if (judged) std::printf(",\"pair_must_us\":%.1f", cell.must);
    std::printf("}\n");
    std::fflush(stdout);
  }
  rank.close(mesh);
}

// Times of the kernels whose name has this function, call after call: `launches` a call, of which every launches-th from `first` on.
double median_of(const std::vector<KernelRecord>& records, const char* function, int calls, int launches, int first) {
  std::vector<double> us;
  int found = 0;
  for (const KernelRecord& record : records) {
    if (record.name.find(function) == std::string::npos) continue;
    if (found++ % launches == first) us.push_back(record.us);
  }
  CHECK_EQ(found, calls * launches);  // one launch a call, two with hooks
  return median(us);
}
// Users look for kernels by the names dispatch and combine: nothing else is called so.
void check_names(const std::vector<KernelRecord>& records) {
  for (const KernelRecord& record : records)
    for (const char* word : {"dispatch", "combine"}) {
      if (record.name.find(word) == std::string::npos) continue;
      const std::string wanted = std::string("nixl::core::ep::") + word;
      if (record.name.find(wanted) == std::string::npos)
        check::failed(__FILE__, __LINE__, "a kernel that is no " + std::string(word) + " is named " + record.name);
    }
}

void record_kernels(Mesh& mesh, const Cell& cell) {
  const Case c = case_of(cell, mesh.size());
  Rank rank(mesh, c);
  Path& path = *rank.path;
  cudaStream_t stream = rank.t.stream;
  const auto together = [&] {
    OK(path.barrier(stream));
    pause(kSettleUs, stream);
  };
  const auto begin = [&] {
    CUDA_OK(cudaStreamSynchronize(stream));
    (void)take_records();
    mesh.barrier();
    pause(3000, stream);  // meanwhile everything is queued
  };
  begin();
  for (int i = 0; i < kRecorded; ++i) {
    together();
    OK(path.dispatch(rank.d));
    together();
    OK(path.combine(rank.a));
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  const auto whole = take_records();
  begin();
  for (int i = 0; i < kRecordedSplits; ++i) {
    together();
    OK(path.dispatch_send(rank.d));
    pause(kOverlapUs, stream);
    OK(path.dispatch_recv(rank.d));
    together();
    OK(path.combine_send(rank.split));
    pause(kOverlapUs, stream);
    OK(path.combine_recv(rank.split));
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  const auto split = take_records();
  check_names(whole);
  check_names(split);
  const double us[6] = {
      mesh.worst(median_of(whole, "::dispatch", kRecorded, 1, 0)),
      mesh.worst(median_of(whole, "::combine", kRecorded, 1, 0)),
      mesh.worst(median_of(split, "::dispatch", kRecordedSplits, 2, 0)),
      mesh.worst(median_of(split, "::dispatch", kRecordedSplits, 2, 1)),
      mesh.worst(median_of(split, "::combine", kRecordedSplits, 2, 0)),
      mesh.worst(median_of(split, "::combine", kRecordedSplits, 2, 1)),
  };
  if (mesh.rank() == 0) {
    std::fprintf(stderr, "%-24s kernels d %7.2f  c %7.2f  d send %7.2f receive %7.2f  c send %7.2f receive %7.2f\n",
                 cell.name, us[0], us[1], us[2], us[3], us[4], us[5]);
    print_head("kernels", c);
    std::printf(
        ",\"dispatch_us\":%.2f,\"combine_us\":%.2f,\"dispatch_send_us\":%.2f,\"dispatch_receive_us\":%.2f,"
        "\"combine_send_us\":%.2f,\"combine_receive_us\":%.2f}\n",
        us[0], us[1], us[2], us[3], us[4], us[5]);
    std::fflush(stdout);
  }
  rank.close(mesh);
}

}  // namespace
}  // namespace gpu_test

int main(int argc, char** argv) {
  using namespace gpu_test;
  const int found = count_gpus();
  if (found < 2) {
    std::printf("skipped: %d CUDA devices, 2 are needed\n", found);
    return 77;
  }
  const int ranks = argc > 1 ? std::atoi(argv[1]) : std::min(found, 8);
  if (ranks < 2 || ranks > std::min(found, 8)) {
    std::fprintf(stderr, "%d ranks; 2 to %d are allowed here\n", ranks, std::min(found, 8));
    return 2;
  }
  const char* part = argc > 2 ? argv[2] : "";
  std::vector<Cell> cells;
  for (const Cell& cell : cells_of(ranks))
    if (std::strstr(cell.name, part)) cells.push_back(cell);
  const int count = static_cast<int>(cells.size());
  const std::string method = replay_method(kChain);
  std::fprintf(stderr, "%d ranks, a GPU each. Replayed: %s.\n", ranks, method.c_str());
  std::printf("{\"kind\":\"method\",\"ranks\":%d,\"replayed\":\"%s\",\"kernels\":\"%s\"}\n", ranks, method.c_str(),
              kKernelMethod);
  auto failed = run_in_turn(
      count, ranks, found, [&](Mesh& mesh, int i) { time_replays(mesh, cells[i]); }, 100);
  // Processes of their own: what is recorded slows launches down.
  std::fprintf(stderr, "Kernels: %s.\n", kKernelMethod);
  bool opened = false;
  const auto later = run_in_turn(
      count, ranks, found,
      [&](Mesh& mesh, int i) {
        if (!opened)
          if (const std::string why = start_recording(); !why.empty())
            check::failed(__FILE__, __LINE__, "no kernel times: " + why);
        opened = true;
        record_kernels(mesh, cells[i]);
      },
      100);
  failed.insert(failed.end(), later.begin(), later.end());
  for (int i : failed) std::fprintf(stderr, "FAILED %s\n", i < count ? cells[i].name : "at its end");
  return failed.empty() ? 0 : 1;
}
