// Times dispatch, combine and their pair on the CUDA path: graphs of 20 operations, replayed; a rank's figure is its median over
// replays, the table shows the worst rank. Prints a table on stderr and JSON lines on stdout.
//   ep_cuda_bench [ranks] [name part]
#include <cstdio>
#include <cstdlib>
#include <random>

#include "bodies.h"

namespace gpu_test {
namespace {

constexpr int kChain = 20, kWarmUps = 4, kReplays = 15;

struct Cell {
  const char* name;
  int tokens, hidden, experts, topk, payload;
  double must;  // of the pair on 4 GPUs, us
};

// Microseconds of one step of a graph of kChain steps, this rank's median.
double time_chain(Mesh& mesh, cudaStream_t stream, const std::function<void()>& step) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kChain; ++i) step();
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<double> us;
  for (int i = 0; i < kWarmUps + kReplays; ++i) {
    mesh.barrier();
    CUDA_OK(cudaEventRecord(begin, stream));
    CUDA_OK(cudaGraphLaunch(exec, stream));
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    float ms = 0;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= kWarmUps) us.push_back(ms * 1000 / kChain);
  }
  CUDA_OK(cudaGraphExecDestroy(exec));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  std::sort(us.begin(), us.end());
  return us[us.size() / 2];
}

void run_cell(Mesh& mesh, const Cell& cell) {
  Case c;
  c.name = cell.name;
  c.ranks = mesh.size();
  c.max_tokens = cell.tokens;
  c.hidden = cell.hidden;
  c.experts = cell.experts / mesh.size();
  c.topk = cell.topk;
  c.payload = cell.payload;
  c.seed = 9;
  PathOptions options;
  options.rank = mesh.rank();
  options.combine = nixl::ep::Combine::kReduced;
  options.timeout_ns = 5'000'000'000;
  options.incarnation = 77 + mesh.rank();
  std::size_t free_before = 0, free_after = 0, total = 0;
  CUDA_OK(cudaFree(nullptr));
  auto path = OK(open_cuda_path(options));
  CUDA_OK(cudaMemGetInfo(&free_before, &total));
  OK(path->reserve({c.ranks, c.experts, bytes_for(c)}));
  CUDA_OK(cudaMemGetInfo(&free_after, &total));
  connect(*path, mesh, options.incarnation);
  Tensors t(c, mesh.rank());
  std::mt19937 random(mesh.rank());
  std::vector<std::uint16_t> block(1 << 22);
  for (auto& v : block) v = layout::bf16_from_float((static_cast<int>(random() % 2001) - 1000) * 1e-3f);
  for (std::size_t at = 0; at < t.y.size(); at += block.size())
    CUDA_OK(
        cudaMemcpy(t.y.get() + at, block.data(), 2 * std::min(block.size(), t.y.size() - at), cudaMemcpyHostToDevice));
  Dispatch d = t.dispatch();
  d.recv_stats = nullptr;
  d.wait_cost = nullptr;
  CombineArgs a = t.combine();
  OK(path->dispatch(d));
  OK(path->combine(a));
  CUDA_OK(cudaStreamSynchronize(t.stream));
  const double dispatch = time_chain(mesh, t.stream, [&] { OK(path->dispatch(d)); });
  const double combine = time_chain(mesh, t.stream, [&] { OK(path->combine(a)); });
  const double pair = time_chain(mesh, t.stream, [&] {
    OK(path->dispatch(d));
    OK(path->combine(a));
  });
  CombineArgs s = a;
  s.sends_only = true;
  const double split_dispatch = time_chain(mesh, t.stream, [&] {
    OK(path->dispatch_send(d));
    OK(path->dispatch_recv(d));
  });
  const double split_combine = time_chain(mesh, t.stream, [&] {
    OK(path->combine_send(s));
    OK(path->combine_recv(s));
  });
  CHECK_EQ(path->take_faults().size(), std::size_t(0));
  const double worst[5] = {mesh.worst(dispatch), mesh.worst(combine), mesh.worst(pair), mesh.worst(split_dispatch),
                           mesh.worst(split_combine)};
  const double megabytes = mesh.worst((free_before - free_after) / 1e6);
  if (mesh.rank() == 0) {
    std::fprintf(stderr, "%-28s d %7.2f  c %7.2f  pair %7.2f  must %6.1f %-4s split d %7.2f c %7.2f  memory %6.0f MB\n",
                 cell.name, worst[0], worst[1], worst[2], cell.must, worst[2] <= cell.must ? "met" : "", worst[3],
                 worst[4], megabytes);
    std::printf(
        "{\"case\":\"%s\",\"ranks\":%d,\"tokens\":%d,\"hidden\":%d,\"experts\":%d,\"topk\":%d,\"payload\":%d,"
        "\"dispatch_us\":%.2f,\"combine_us\":%.2f,"
        "\"pair_us\":%.2f,\"pair_must_us\":%.1f,\"split_dispatch_us\":%.2f,\"split_combine_us\":%.2f,\"memory_mb\":%."
        "0f}\n",
        cell.name, c.ranks, c.max_tokens, c.hidden, cell.experts, c.topk, c.payload, worst[0], worst[1], worst[2],
        cell.must, worst[3], worst[4], megabytes);
  }
  OK(path->close());
  mesh.barrier();
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
  const char* part = argc > 2 ? argv[2] : "";
  const int experts = 32 * ranks;
  const Cell cells[] = {
      {"1 token", 1, 7168, experts, 8, 1, 12},
      {"8 tokens", 8, 7168, experts, 8, 1, 15.5},
      {"32 tokens", 32, 7168, experts, 8, 1, 20},
      {"128 tokens", 128, 7168, experts, 8, 1, 44},
      {"128 tokens, BF16", 128, 7168, experts, 8, 0, 58},
      {"256 tokens", 256, 7168, experts, 8, 1, 85},
      {"512 tokens", 512, 7168, experts, 8, 1, 165},
      {"1024 tokens", 1024, 7168, experts, 8, 1, 320},
      {"8 experts, top-k 2", 128, 7168, 8, 2, 1, 26},
      {"16 experts, top-k 1", 128, 7168, 16, 1, 1, 20},
      {"hidden 4096", 128, 4096, 128, 8, 1, 31},
      {"hidden 2048", 128, 2048, 128, 8, 1, 22},
  };
  int failed = 0;
  for (const Cell& cell : cells)
    if (std::strstr(cell.name, part))
      failed += run_ranks(
                    ranks, found, [&](Mesh& mesh) { run_cell(mesh, cell); }, 100) > 0;
  return failed ? 1 : 0;
}
