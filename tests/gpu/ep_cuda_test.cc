// The CUDA path against plain loops, bit for bit: ranks are processes, on a GPU each or (NIXL_EP_LINE_BYTES=16) on one.
//   ep_cuda_test [ranks] [gpus] [name part]
// EP_TEST_STRESS: replays of 31 operations in each of the three stress cases (default 20).
#include <cstdio>
#include <cstdlib>

#include "bodies.h"
#include "compare.h"
#include "judge.h"

namespace gpu_test {
namespace {

std::vector<Case> cases(int ranks) {
  std::vector<Case> list;
  const auto add = [&](const char* name, auto change) {
    Case c;
    c.name = name;
    c.ranks = ranks;
    c.max_tokens = 64;
    c.seed = static_cast<std::uint32_t>(list.size() + 1);
    change(c);
    list.push_back(c);
  };
  add("fp8", [](Case&) {});
  add("one token", [](Case& c) { c.max_tokens = 1; });
  add("one token exact", [](Case& c) {
    c.max_tokens = 1;
    c.exact = true;
  });
  add("eight tokens", [](Case& c) { c.max_tokens = 8; });
  add("bf16", [](Case& c) { c.payload = 0; });
  add("power of two scales", [](Case& c) {
    c.payload = 2;
    c.hidden = 5120;
  });
  add("ue8m0, int64", [](Case& c) {
    c.payload = 3;
    c.hidden = 4096;
    c.index_bytes = 8;
  });
  add("holes", [](Case& c) { c.holes = 6; });
  add("all negative", [](Case& c) { c.holes = 16; });
  add("odd hidden", [](Case& c) {
    c.hidden = 1664;
    c.payload = 1;
  });
  add("odd hidden bf16", [](Case& c) {
    c.hidden = 2176;
    c.payload = 0;
    c.exact = true;
  });
  add("tiny hidden", [](Case& c) {
    c.hidden = 128;
    c.topk = 2;
  });
  add("wide hidden", [](Case& c) {
    c.hidden = 16384;
    c.max_tokens = 16;
    c.payload = 0;
  });
  add("few tokens on a rank", [](Case& c) { c.few = 0; });
  add("duplicates", [](Case& c) {
    c.duplicates = true;
    c.spread = 3;
    c.max_tokens = 20;
  });
  add("all to one rank", [](Case& c) {
    c.spread = c.experts;
    c.topk = 4;
  });
  add("exact", [](Case& c) { c.exact = true; });
  add("split", [](Case& c) { c.split = true; });
  add("split, eight tokens", [](Case& c) {
    c.split = true;
    c.max_tokens = 8;
    c.topk = 2;
  });
  add("split, weights", [](Case& c) {
    c.split = true;
    c.weights = true;
  });
  add("weights", [](Case& c) {
    c.weights = true;
    c.topk = 16;
  });
  add("top-k 32", [](Case& c) {
    c.topk = 32;
    c.experts = 16;
    c.max_tokens = 24;
    c.hidden = 2048;
  });
  add("top-k 1", [](Case& c) {
    c.topk = 1;
    c.experts = 4;
    c.max_tokens = 128;
  });
  add("zero copy", [](Case& c) {
    c.zero_copy = true;
    c.hidden = 2048;
  });
  add("many tokens", [](Case& c) {
    c.max_tokens = 700;
    c.hidden = 1024;
    c.topk = 6;
  });
  add("128 tokens", [](Case& c) {
    c.max_tokens = 128;
    c.experts = 32;
  });
  return list;
}

// What a set of inputs must give, on the device.
struct Outputs {
  Device<std::uint8_t> x;
  Device<std::uint32_t> scales;
  Device<std::int32_t> count, info;
  Device<std::uint16_t> out;

  explicit Outputs(const Tensors& t)
      : x(t.recv_x.download()),
        scales(t.scales.download()),
        count(t.count.download()),
        info(t.info.download()),
        out(t.out.download()) {}
  void compare_dispatch(const Tensors& got, unsigned long long* wrong, cudaStream_t stream) const {
    const Case& c = got.c;
    compare_bytes(got.count.get(), count.get(), std::int64_t{4} * c.experts, wrong, stream);
    compare_rows(got.recv_x.get(), x.get(), count.get(), c.experts, c.rows(),
                 static_cast<int>(layout::row_bytes(c.payload, c.hidden)), wrong, stream);
    compare_rows(got.info.get(), info.get(), count.get(), c.experts, c.rows(), 4, wrong, stream);
    compare_columns(got.scales.get(), scales.get(), count.get(), c.experts, c.rows(),
                    static_cast<int>(layout::scale_words(c.payload, c.hidden)), wrong, stream);
  }
};

void run_case(Mesh& mesh, const Case& c) {
  auto path = open_rank(mesh, c, 1000 + mesh.rank(), 5'000'000'000);
  connect(*path, mesh, 1000 + mesh.rank());
  Tensors t(c, mesh.rank());
  const std::vector<bool> absent(c.ranks, false);
  for (int time = 1; time <= 3; ++time) {
    t.run_dispatch(*path);
    CUDA_OK(cudaStreamSynchronize(t.stream));
    no_faults(*path, c.name);
    check_dispatch(t, absent, time);
    fill_rows(*path, t);
    for (int again = 0; again < 2; ++again) {
      t.out.fill(0xff);
      CUDA_OK(cudaDeviceSynchronize());
      t.run_combine(*path);
      CUDA_OK(cudaStreamSynchronize(t.stream));
      no_faults(*path, c.name);
      check_combine(t, absent);
    }
    if (time == 2) OK(path->barrier(t.stream));
    const View data = path->data_memory();
    CUDA_OK(cudaStreamSynchronize(t.stream));
    mesh.barrier();
    if (time == 1 && mesh.rank() % 2) fill(data.data, 0, data.shape[0]);
    CUDA_OK(cudaDeviceSynchronize());
    mesh.barrier();
  }
  const auto present = delivered(c, mesh.rank());
  bool cut = false;
  for (int token = 0; token < c.tokens(mesh.rank()); ++token)
    for (int place = 0; place < c.topk; ++place)
      cut = cut || (token_ids(c, mesh.rank(), token)[place] >= 0 && !present[std::size_t(token) * c.topk + place]);
  CHECK_EQ(path->take_input_error().empty(), !cut);
  OK(path->close());
  mesh.barrier();
}

// Graphs of an odd number of operations, replayed. All three sets of inputs write the same outputs, so a row that does not come
// is there as another set's; every replay's outputs are compared on the device with outputs that were checked. Random pauses
// before each operation draw the ranks apart.
void stress(Mesh& mesh, const Case& base, int rounds) {
  constexpr int kSets = 3, kPairs = 15;  // and one barrier: 31 operations
  auto path = open_rank(mesh, base, 500 + mesh.rank(), 20'000'000'000);
  connect(*path, mesh, 500 + mesh.rank());
  const std::vector<bool> absent(base.ranks, false);
  std::vector<std::unique_ptr<Tensors>> sets;
  std::vector<Outputs> want;
  for (int i = 0; i < kSets; ++i) {
    Case c = base;
    c.seed = 77 + i;
    sets.push_back(std::make_unique<Tensors>(c, mesh.rank()));
    Tensors& t = *sets.back();
    t.run_dispatch(*path);
    CUDA_OK(cudaStreamSynchronize(t.stream));
    check_dispatch(t, absent, 1);
    fill_rows(*path, t);
    CUDA_OK(cudaDeviceSynchronize());
    t.run_combine(*path);
    CUDA_OK(cudaStreamSynchronize(t.stream));
    check_combine(t, absent);
    want.emplace_back(t);
  }
  Device<unsigned long long> wrong(1);
  wrong.fill(0);
  CUDA_OK(cudaDeviceSynchronize());
  mesh.barrier();
  Tensors& common = *sets[0];
  cudaStream_t stream = common.stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < kPairs; ++i) {
    const Outputs& right = want[i % kSets];
    Dispatch d = sets[i % kSets]->dispatch();
    CombineArgs a = sets[i % kSets]->combine();
    d.stream = a.stream = stream;
    d.recv_x = common.recv_x.get();
    d.recv_scales = common.scales.get();
    d.src_info = common.info.get();
    a.src_info = common.info.get();
    d.recv_count = common.count.get();
    a.out = common.out.get();
    pause_randomly(mix(mesh.rank(), i, 5), stream);
    OK(path->dispatch(d));
    right.compare_dispatch(common, wrong.get(), stream);
    pause_randomly(mix(mesh.rank(), i, 6), stream);
    OK(path->combine(a));
    compare_bytes(common.out.get(), right.out.get(), std::int64_t{2} * base.tokens(mesh.rank()) * base.hidden,
                  wrong.get(), stream);
    if (i == 7) OK(path->barrier(stream));
  }
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&exec, graph, 0));
  for (int round = 0; round < rounds; ++round) {
    CUDA_OK(cudaGraphLaunch(exec, stream));
    if (round % 20 == 19) CUDA_OK(cudaStreamSynchronize(stream));
  }
  CUDA_OK(cudaStreamSynchronize(stream));
  no_faults(*path, "stress");
  CHECK_EQ(wrong.download()[0], 0ull);
  if (mesh.rank() == 0)
    std::printf("stress %s: %d operations a rank, every row, scale, count and sum compared: 0 wrong words\n", base.name,
                rounds * (2 * kPairs + 1));
  mesh.barrier();
  OK(path->close());
  mesh.barrier();
}

}  // namespace
}  // namespace gpu_test

int main(int argc, char** argv) {
  using namespace gpu_test;
  const int found = count_gpus();
  if (found == 0) {
    std::printf("SKIP: no CUDA device\n");
    return 77;
  }
  const int ranks = argc > 1 ? std::atoi(argv[1]) : found > 1 ? std::min(found, 8) : 2;
  const int gpus = argc > 2 ? std::atoi(argv[2]) : found;
  const char* part = argc > 3 ? argv[3] : "";
  if (ranks > gpus) {
    ::setenv("NIXL_EP_LINE_BYTES", "16", 1);
    ::setenv("EP_TEST_BLOCKS", "24", 0);
  }
  std::vector<Case> wanted;
  for (const Case& c : cases(ranks))
    if (std::strstr(c.name, part)) wanted.push_back(c);
  int ran = static_cast<int>(wanted.size());
  const auto one = [&](Mesh& mesh, int i) {
    run_case(mesh, wanted[i]);
    if (mesh.rank() == 0) std::printf("ok     %s\n", wanted[i].name);
    std::fflush(stdout);
  };
  const std::vector<int> wrong_cases = run_in_turn(ran, ranks, gpus, one, 240);
  for (int i : wrong_cases) std::printf("FAILED %s\n", i < ran ? wanted[i].name : "at its end");
  std::fflush(stdout);
  int failed = static_cast<int>(wrong_cases.size());
  const char* rounds_text = std::getenv("EP_TEST_STRESS");
  const int rounds = rounds_text ? std::atoi(rounds_text) : 20;
  for (int tokens : {4, 48, 128}) {
    Case c;
    c.ranks = ranks;
    c.max_tokens = tokens;
    c.hidden = 2048;
    c.name = tokens == 4 ? "4 tokens" : tokens == 48 ? "48 tokens" : "128 tokens";
    if (*part && !std::strstr("stress", part)) continue;
    const int wrong = run_ranks(
        ranks, gpus, [&](Mesh& mesh) { stress(mesh, c, rounds); }, 240);
    failed += wrong > 0;
    ++ran;
  }
  std::printf("%d of %d passed on %d ranks, %d GPUs\n", ran - failed, ran, ranks, gpus);
  return failed ? 1 : 0;
}
