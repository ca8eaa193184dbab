// The grid of shapes: every cell is right to the bit, and no cell is slower than one that moves more bytes.
//   ep_cuda_grid [ranks] [hidden]      128 tokens a rank, FP8 dispatch
// Prints a table of pair times on stderr and JSON lines on stdout.
#include <cstdio>
#include <cstdlib>

#include "judge.h"
#include "timing.h"

namespace gpu_test {
namespace {

constexpr int kHiddens[] = {2048, 4096, 5120, 6144, 7168};
constexpr int kExperts[] = {8, 16, 128, 256, 384};
constexpr int kTopks[] = {1, 2, 4, 6, 8};
constexpr int kChain = 20;
constexpr int kVisits = 2;        // of each cell, each with memory of its own
constexpr double kSpread = 0.01;  // noise is not taken for less

struct Cell {
  int hidden = 0, experts = 0, topk = 0;
  int visits = 0;
  double pair_us[kVisits] = {};
  double link_bytes = 0, memory_bytes = 0;  // of the rank that moves most
  bool measured() const { return visits == kVisits; }
  double quickest() const { return *std::min_element(pair_us, pair_us + kVisits); }
  double slowest() const { return *std::max_element(pair_us, pair_us + kVisits); }
};

void check_once(Path& path, Tensors& t) {
  const std::vector<bool> absent(t.c.ranks, false);
  t.run_dispatch(path);
  CUDA_OK(cudaStreamSynchronize(t.stream));
  no_faults(path, t.c.name);
  check_dispatch(t, absent, 1);
  fill_rows(path, t);
  CUDA_OK(cudaDeviceSynchronize());
  t.run_combine(path);
  CUDA_OK(cudaStreamSynchronize(t.stream));
  no_faults(path, t.c.name);
  check_combine(t, absent);
}

// The first visit is judged, every visit is timed.
void visit_cell(Mesh& mesh, Cell& shared) {
  Cell cell = shared;
  Case c;
  c.name = "grid";
  c.ranks = mesh.size();
  c.experts = cell.experts / mesh.size();
  c.hidden = cell.hidden;
  c.topk = cell.topk;
  c.seed = 11;
  const auto incarnation = static_cast<std::uint32_t>(300 + mesh.rank());
  auto path = open_rank(mesh, c, incarnation, 5'000'000'000);
  connect(*path, mesh, incarnation);
  Tensors t(c, mesh.rank());
  if (cell.visits == 0)
    check_once(*path, t);
  else
    t.fill_answers();
  mesh.barrier();  // judged by everybody: from here on all are quick

  Dispatch d = t.dispatch();
  d.recv_stats = nullptr;
  d.wait_cost = nullptr;
  const CombineArgs a = t.combine();
  const auto worst_time = [&](const std::function<void()>& step) {
    return mesh.worst(time_chain(mesh, t.stream, kChain, step));
  };
  const double dispatch = worst_time([&] { OK(path->dispatch(d)); });
  const double combine = worst_time([&] { OK(path->combine(a)); });
  const double pair = worst_time([&] {
    OK(path->dispatch(d));
    OK(path->combine(a));
  });
  const Traffic own = traffic_of(c, mesh.rank());
  cell.link_bytes = mesh.worst(own.link());
  cell.memory_bytes = mesh.worst(own.memory);
  no_faults(*path, c.name);
  if (mesh.rank() == 0) {
    cell.pair_us[cell.visits++] = pair;
    shared = cell;
    std::printf(
        "{\"kind\":\"grid\",\"ranks\":%d,\"hidden\":%d,\"experts\":%d,\"topk\":%d,\"visit\":%d,\"pair_us\":%.2f,"
        "\"dispatch_us\":%.2f,\"combine_us\":%.2f,\"link_bytes\":%.0f,\"memory_bytes\":%.0f}\n",
        c.ranks, cell.hidden, cell.experts, cell.topk, cell.visits, pair, dispatch, combine, cell.link_bytes,
        cell.memory_bytes);
    std::fflush(stdout);
  }
  mesh.barrier();
  OK(path->close());
  mesh.barrier();
}

void print_table(const Cell* cells, int count) {
  std::fprintf(stderr, "pair, us:          top-k");
  for (int topk : kTopks) std::fprintf(stderr, "%8d", topk);
  for (int i = 0; i < count; ++i) {
    if (cells[i].topk == kTopks[0])
      std::fprintf(stderr, "\nhidden %4d, %3d experts ", cells[i].hidden, cells[i].experts);
    if (cells[i].measured())
      std::fprintf(stderr, "%8.2f", cells[i].quickest());
    else
      std::fprintf(stderr, "%8s", "-");
  }
  std::fprintf(stderr, "\n");
}

// Cells slower than one that moves at least as many bytes over the link and in memory, by more than noise: the quicker visit of the
// one against the slower visit of the other, and kSpread of that.
int report_inversions(const Cell* cells, int count) {
  struct Inversion {
    const Cell *slow, *more;
    double us;
  };
  std::vector<Inversion> found;
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < count; ++j) {
      const Cell &slow = cells[i], &more = cells[j];
      if (!slow.measured() || !more.measured() || i == j) continue;
      if (more.link_bytes < slow.link_bytes || more.memory_bytes < slow.memory_bytes) continue;
      const double us = slow.quickest() - more.slowest();
      if (us > kSpread * more.slowest()) found.push_back({&slow, &more, us});
    }
  std::sort(found.begin(), found.end(), [](const Inversion& a, const Inversion& b) { return a.us > b.us; });
  for (std::size_t i = 0; i < found.size() && i < 20; ++i) {
    const Cell &slow = *found[i].slow, &more = *found[i].more;
    std::fprintf(
        stderr,
        "slower by %.2f us: hidden %d, %d experts, top-k %d (%.2f us, link %.2f MB, memory %.2f MB) than hidden %d, %d "
        "experts, top-k %d (%.2f us, %.2f, %.2f)\n",
        found[i].us, slow.hidden, slow.experts, slow.topk, slow.quickest(), slow.link_bytes * 1e-6,
        slow.memory_bytes * 1e-6, more.hidden, more.experts, more.topk, more.slowest(), more.link_bytes * 1e-6,
        more.memory_bytes * 1e-6);
  }
  return static_cast<int>(found.size());
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
  const int only = argc > 2 ? std::atoi(argv[2]) : 0;
  if (ranks < 2 || ranks > std::min(found, 8) || 8 % ranks != 0) {
    std::fprintf(stderr, "%d ranks; 2, 4 and 8 are allowed, as many as there are GPUs (%d)\n", ranks, found);
    return 2;
  }
  constexpr std::size_t kMost = std::size(kHiddens) * std::size(kExperts) * std::size(kTopks);
  auto* cells = static_cast<Cell*>(
      ::mmap(nullptr, kMost * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  CHECK(static_cast<void*>(cells) != MAP_FAILED);
  int count = 0;
  for (int hidden : kHiddens)
    for (int experts : kExperts)
      for (int topk : kTopks)
        if (only == 0 || hidden == only) {
          cells[count].hidden = hidden;
          cells[count].experts = experts;
          cells[count++].topk = topk;
        }
  const auto failed = run_in_turn(
      kVisits * count, ranks, found, [&](Mesh& mesh, int i) { visit_cell(mesh, cells[i % count]); }, 280);
  print_table(cells, count);
  std::fprintf(stderr, "Replayed: %s.\n", replay_method(kChain).c_str());
  for (int i : failed)
    if (i < count)
      std::fprintf(stderr, "FAILED hidden %d, %d experts, top-k %d\n", cells[i].hidden, cells[i].experts,
                   cells[i].topk);
  const int inversions = report_inversions(cells, count);
  std::fprintf(stderr,
               "%d cells, each in %d visits, on %d ranks: %zu failed; %d pairs of cells where the one with fewer bytes "
               "is slower\n",
               count, kVisits, ranks, failed.size(), inversions);
  std::printf("{\"kind\":\"grid_summary\",\"ranks\":%d,\"cells\":%d,\"failed\":%zu,\"inversions\":%d}\n", ranks, count,
              failed.size(), inversions);
  // Between two ranks the work on a token's own rank decides as much as its bytes: told, not judged.
  return failed.empty() && (inversions == 0 || ranks == 2) ? 0 : 1;
}
