// The CUDA path against plain loops, bit for bit: ranks are processes, on a GPU each or (NIXL_EP_LINE_BYTES=16) on one.
//   ep_cuda_test [ranks] [gpus] [name part]
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>

#include "bodies.h"
#include "compare.h"

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

void check_dispatch(const Tensors& t, const std::vector<bool>& absent, int times) {
  const Case& c = t.c;
  const auto rows = expected_rows(c, t.rank);
  const auto count = t.count.download();
  const auto stats = t.stats.download();
  const auto range = t.range.download();
  const auto info = t.info.download();
  const auto places = t.places.download();
  const auto weights = t.recv_weights.download();
  const auto scales = t.scales.download();
  const std::size_t bytes = layout::row_bytes(c.payload, c.hidden), words = layout::scale_words(c.payload, c.hidden);
  for (int expert = 0; expert < c.experts; ++expert) {
    int row = 0;
    std::vector<int> of(c.ranks, 0), first(c.ranks, 0);
    std::vector<Row> present;
    for (const Row& r : rows[expert])
      if (!absent[r.source]) present.push_back(r);
    CHECK_EQ(count[expert], static_cast<int>(present.size()));
    if (times > 0) CHECK_EQ(stats[expert], times * static_cast<int>(present.size()));
    const auto got = t.recv_x.download(std::size_t(expert) * c.rows() * bytes, present.size() * bytes);
    for (const Row& r : present) {
      const std::size_t at = std::size_t(expert) * c.rows() + row;
      CHECK_EQ(info[at], r.token);
      CHECK_EQ(int(places[at]), r.place);
      if (c.weights) CHECK_EQ(weights[at], token_weight(c, r.source, r.token, r.place));
      const Quantized want = quantized(c, token_row(c, r.source, r.token));
      if (std::memcmp(got.data() + row * bytes, want.bytes.data(), bytes) != 0) {
        std::size_t i = 0;
        while (got[row * bytes + i] == want.bytes[i]) ++i;
        std::fprintf(stderr, "%s rank %d expert %d row %d (source %d token %d): byte %zu is %02x, %02x expected\n",
                     c.name, t.rank, expert, row, r.source, r.token, i, got[row * bytes + i], want.bytes[i]);
        CHECK(false);
      }
      for (std::size_t w = 0; w < words; ++w)
        CHECK_EQ(scales[(std::size_t(expert) * words + w) * c.rows() + row], want.scales[w]);
      if (of[r.source]++ == 0) first[r.source] = row;
      ++row;
    }
    for (int source = 0; source < c.ranks; ++source) {
      CHECK_EQ(int(range[std::size_t(expert) * c.ranks + source] & 0xffffffff), of[source]);
      if (of[source]) CHECK_EQ(int(range[std::size_t(expert) * c.ranks + source] >> 32), first[source]);
    }
    if (times > 0 && row < c.rows())
      CHECK_EQ(static_cast<unsigned>(info[std::size_t(expert) * c.rows() + row]), 0xeeeeeeeeu);
  }
}

// Fills y with the experts' rows.
void fill_rows(Path& path, const Tensors& t) {
  const Case& c = t.c;
  std::uint16_t* base = t.y.get();
  std::int64_t stride = c.hidden, block = std::int64_t{c.rows()} * c.hidden;
  if (c.zero_copy) {
    const View view = OK(path.next_combine_buffer(c.max_tokens, c.hidden, c.ranks));
    base = static_cast<std::uint16_t*>(view.data);
    block = view.stride[0];
    stride = view.stride[1];
  } else {
    CUDA_OK(cudaMemset(base, 0xff, t.y.size() * 2));  // NaN where no row is
  }
  const auto rows = expected_rows(c, t.rank);
  std::vector<std::uint16_t> host;
  for (int expert = 0; expert < c.experts; ++expert) {
    host.assign(rows[expert].size() * stride, 0);
    for (std::size_t i = 0; i < rows[expert].size(); ++i)
      expert_row(c, t.rank * c.experts + expert, rows[expert][i].source, rows[expert][i].token, rows[expert][i].place,
                 host.data() + i * stride);
    CUDA_OK(cudaMemcpy(base + expert * block, host.data(), host.size() * 2, cudaMemcpyHostToDevice));
  }
}
void check_combine(const Tensors& t, const std::vector<bool>& absent) {
  const Case& c = t.c;
  const auto out = t.out.download();
  const bool exact = c.exact || (c.split && !c.weights);
  const auto present = delivered(c, t.rank);
  for (int token = 0; token < c.tokens(t.rank); ++token) {
    const auto want = combined(c, t.rank, token, exact, absent, present);
    for (int i = 0; i < c.hidden; ++i) {
      if (out[std::size_t(token) * c.hidden + i] == want[i]) continue;
      std::fprintf(stderr, "%s rank %d token %d channel %d: %04x, %04x expected\n", c.name, t.rank, token, i,
                   out[std::size_t(token) * c.hidden + i], want[i]);
      CHECK(false);
    }
  }
}

std::unique_ptr<Path> open_rank(Mesh& mesh, const Case& c, std::uint32_t incarnation, Nanoseconds timeout) {
  PathOptions options;
  options.rank = mesh.rank();
  options.combine = c.exact ? nixl::ep::Combine::kExact : nixl::ep::Combine::kReduced;
  options.timeout_ns = timeout;
  options.incarnation = incarnation;
  if (const char* blocks = std::getenv("EP_TEST_BLOCKS")) options.max_blocks = std::atoi(blocks);
  auto path = OK(open_cuda_path(options));
  OK(path->reserve({c.ranks, c.experts, bytes_for(c)}));
  return path;
}
void no_faults(Path& path, const char* where) {
  for (const Fault& fault : path.take_faults()) {
    std::fprintf(stderr, "%s: fault of rank %d, operation %llu, phase %d, expected %llx, seen %llx\n", where,
                 fault.rank, static_cast<unsigned long long>(fault.operation), static_cast<int>(fault.phase),
                 static_cast<unsigned long long>(fault.expected), static_cast<unsigned long long>(fault.seen));
    CHECK(false);
  }
}

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
    if (time == 1 && mesh.rank() % 2) CUDA_OK(cudaMemset(data.data, 0, data.shape[0]));
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

// Graphs of an odd number of operations, replayed; every replay's outputs are compared on the device with outputs that were
// checked, three sets of inputs in turn, with random pauses between ranks.
void stress(Mesh& mesh, const Case& base, int rounds) {
  auto path = open_rank(mesh, base, 500 + mesh.rank(), 20'000'000'000);
  connect(*path, mesh, 500 + mesh.rank());
  const std::vector<bool> absent(base.ranks, false);
  std::vector<std::unique_ptr<Tensors>> sets;
  std::vector<Device<std::uint8_t>> want_x;
  std::vector<Device<std::uint16_t>> want_out;
  for (int i = 0; i < 3; ++i) {
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
    want_x.emplace_back(t.recv_x.download());
    want_out.emplace_back(t.out.download());
  }
  Device<unsigned long long> wrong(1);
  wrong.fill(0);
  CUDA_OK(cudaDeviceSynchronize());
  mesh.barrier();
  cudaStream_t stream = sets[0]->stream;
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  const int per_graph = 15;  // 30 operations
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < per_graph; ++i) {
    Tensors& t = *sets[i % 3];
    Dispatch d = t.dispatch();
    CombineArgs a = t.combine();
    d.stream = a.stream = stream;
    pause_randomly(mix(mesh.rank(), i, 5), stream);
    OK(path->dispatch(d));
    compare_rows(t.recv_x.get(), want_x[i % 3].get(), t.count.get(), base.experts, base.rows(),
                 static_cast<int>(layout::row_bytes(base.payload, base.hidden)), wrong.get(), stream);
    OK(path->combine(a));
    compare_bytes(t.out.get(), want_out[i % 3].get(), std::int64_t{2} * base.tokens(mesh.rank()) * base.hidden,
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
    std::printf("stress %s: %d operations a rank, every row compared: 0 wrong bytes\n", base.name,
                rounds * (2 * per_graph + 1));
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
  int failed = 0, ran = 0;
  std::vector<Case> wanted;
  for (const Case& c : cases(ranks))
    if (std::strstr(c.name, part)) wanted.push_back(c);
  // One set of processes runs the cases in turn; after a failure a new set goes on with the next one.
  auto* at = static_cast<int*>(::mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  CHECK(at != MAP_FAILED);
  for (int begin = 0; begin < static_cast<int>(wanted.size()); begin = *at + 1) {
    *at = begin;
    const int wrong = run_ranks(
        ranks, gpus,
        [&](Mesh& mesh) {
          for (int i = begin; i < static_cast<int>(wanted.size()); ++i) {
            run_case(mesh, wanted[i]);
            if (mesh.rank() == 0) {
              std::printf("ok     %s\n", wanted[i].name);
              std::fflush(stdout);
              *at = i + 1;
            }
            mesh.barrier();
          }
        },
        240);
    if (wrong) std::printf("FAILED %s\n", wanted[*at].name);
    std::fflush(stdout);
    failed += wrong > 0;
    ran = static_cast<int>(wanted.size());
  }
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
        ranks, gpus, [&](Mesh& mesh) { stress(mesh, c, rounds); }, 120);
    failed += wrong > 0;
    ++ran;
  }
  std::printf("%d of %d passed on %d ranks, %d GPUs\n", ran - failed, ran, ranks, gpus);
  return failed ? 1 : 0;
}
