// Floor: how low can expert-parallel dispatch and combine go over NVLink? One process, a thread a GPU, graph-replayed chains of 20
// operations. Plain drafts to measure beside: fixed hidden size 7168, at most 128 tokens, no faults, no masks; the host tells combine the ids
// of all ranks, and the draft that pulls also where the rows lie. No draft is best at every size: the floor of a case is its quickest pair.
//   counted+pull     one token: a hop less, but every row on the link
//   counted+push     some tokens: sums of a rank's rows, as bulk copies
//   indexed+stores   many tokens: places without counting, a warp a row, sums stored straight to the owner
// Each pair must bring back every token times the sum of its weights (calc_diff below 9e-4) before it is timed; a line is the median of 12
// replays at the slowest rank. Exit status 1: a pair was wrong, and is not timed; 2: an operation waited 2 s for another rank.
// Run: ep_floor [GPUS [TOKENS]]   (TOKENS: only the cases of so many tokens a rank)
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "ep_floor_combine.cuh"
#include "ep_floor_dispatch.cuh"

#define CK(x)                                                           \
  do {                                                                  \
    cudaError_t e_ = (x);                                               \
    if (e_ != cudaSuccess) {                                            \
      printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); \
      fflush(stdout);                                                   \
      exit(1);                                                          \
    }                                                                   \
  } while (0)

__global__ void bump(uint32_t* b, int n) {
  *b += n;
}
__global__ void dequant(Args a) {  // y = dequantised row, so combine returns x * sum(w)
  size_t rows = (size_t)a.L * a.R * a.T;
  for (size_t r = blockIdx.x; r < rows; r += gridDim.x) {
    int le = r / (a.R * a.T), i = r % (a.R * a.T);
    for (int c = threadIdx.x; c < H; c += blockDim.x) {
      __nv_fp8_e4m3 q;
      q.__x = a.p[a.rank].x8[r * H + c];
      a.p[a.rank].y[r * H + c] =
          __float2bfloat16(float(q) * a.p[a.rank].sc[((size_t)le * GROUPS + c / 128) * a.R * a.T + i]);
    }
  }
}

struct Case {
  int T, E, k;
};
using Launch = std::function<void(const Args&, cudaStream_t)>;
struct Draft {
  const char* name;
  Launch launch;
};
struct Pair {
  const char* name;
  Launch dispatch, combine;
};
// The inputs of a case, by rank.
struct Inputs {
  std::vector<std::vector<int>> topk;         // [T][k]
  std::vector<std::vector<float>> w;          // [T][k]
  std::vector<std::vector<__nv_bfloat16>> x;  // [T][H]
  std::vector<int16_t> all;                   // [R][T][k]
};

Inputs make_inputs(const Case& c, int R) {
  const int T = c.T, k = c.k;
  Inputs in;
  in.topk.assign(R, std::vector<int>(T * k));
  in.w.assign(R, std::vector<float>(T * k));
  in.x.assign(R, std::vector<__nv_bfloat16>((size_t)T * H));
  in.all.resize((size_t)R * T * k);
  for (int r = 0; r < R; r++) {
    std::mt19937 g(7 * r + T);
    std::normal_distribution<float> nd;
    for (auto& v : in.x[r]) v = __float2bfloat16(nd(g) * 0.1f);
    for (int t = 0; t < T; t++) {
      std::vector<int> ids(c.E);
      for (int i = 0; i < c.E; i++) ids[i] = i;
      std::shuffle(ids.begin(), ids.end(), g);
      for (int j = 0; j < k; j++) {
        in.topk[r][t * k + j] = ids[j];
        in.w[r][t * k + j] = 0.1f + (g() % 100) / 100.f;
        in.all[((size_t)r * T + t) * k + j] = ids[j];
      }
    }
  }
  return in;
}
// [T][K_MAX]: where dispatch puts the rows of a rank's own tokens at their experts' ranks.
std::vector<int> own_places(const Case& c, const Inputs& in, int rank) {
  std::vector<int> places(c.T * K_MAX), taken(c.E);
  const size_t first = (size_t)rank * c.T * c.k;
  for (size_t q = 0; q < first; q++) taken[in.all[q]]++;
  for (int t = 0; t < c.T; t++)
    for (int j = 0; j < c.k; j++) places[t * K_MAX + j] = taken[in.topk[rank][t * c.k + j]]++;
  return places;
}
// 1 - 2 sum(xy) / sum(xx + yy) of a rank's output and of its tokens times their sums of weights, both plus one.
double calc_diff(const Case& c, const Inputs& in, int rank, const std::vector<__nv_bfloat16>& out) {
  double xy = 0, xx = 0;
  for (int t = 0; t < c.T; t++) {
    float sw = 0;
    for (int j = 0; j < c.k; j++) sw += in.w[rank][t * c.k + j];
    for (int i = 0; i < H; i++) {
      const size_t at = (size_t)t * H + i;
      const double want = __bfloat162float(in.x[rank][at]) * sw + 1, got = __bfloat162float(out[at]) + 1;
      xy += want * got;
      xx += want * want + got * got;
    }
  }
  return 1 - 2 * xy / xx;
}

// The memory of all ranks, and the case that they run.
class Ranks {
 public:
  explicit Ranks(int count);
  void load(const Case& c);
  // Dispatch and combine of zeroed rows; whether every rank's output is right.
  bool check(const Pair& pair);
  // Prints us an operation: the median of 12 replays of a graph of 20, at the slowest rank.
  void time(const char* name, int grid, const Launch& launch);

 private:
  void allocate(int r);
  void clear();
  double replay(const char* name, const Launch& launch, int steps, int replays);
  double replay_rank(int r, const Launch& launch, int steps, int replays, std::barrier<>& together);

  const int R;
  const size_t yrows = (size_t)32 * R * 128;  // L <= 32, T <= 128 here
  Case c{};
  Inputs in;
  Peer P[R_MAX] = {};
  std::vector<Args> A;
  std::vector<cudaStream_t> S;
  std::vector<uint32_t*> base;
  std::vector<int*> all_ids;
};

Ranks::Ranks(int count) : R(count), A(R), S(R), base(R), all_ids(R) {
  for (int r = 0; r < R; r++) {
    CK(cudaSetDevice(r));
    for (int q = 0; q < R; q++)
      if (q != r) CK(cudaDeviceEnablePeerAccess(q, 0));
    allocate(r);
    CK(cudaStreamCreateWithFlags(&S[r], cudaStreamNonBlocking));
    for (auto kernel : {dispatch_counted, dispatch_indexed, combine_push})
      CK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000));
  }
}
void Ranks::allocate(int r) {
  auto al = [](auto** p, size_t n) {
    CK(cudaMalloc((void**)p, n));
    CK(cudaMemset((void*)*p, 0, n));
  };
  al(&P[r].msg, 2ull * R_MAX * T_MAX * (MSG + HDR));
  al(&P[r].flag, 2 * R_MAX * T_MAX * 4);
  al(&P[r].table, 2 * R_MAX * T_MAX * K_MAX / 2 * 8);
  al(&P[r].x8, yrows * H);
  al(&P[r].sc, yrows * GROUPS * 4);
  al(&P[r].y, yrows * H * 2);
  al(&P[r].wcell, 2 * R_MAX * T_MAX * K_MAX * 8);
  al(&P[r].part, 2ull * T_MAX * R_MAX * H * 2);
  al(&P[r].pflag, 2 * T_MAX * R_MAX * 2 * 4);
  al(&P[r].ready, R_MAX * 4);
  al(&base[r], 4);
  uint32_t one = 1;
  CK(cudaMemcpy(base[r], &one, 4, cudaMemcpyHostToDevice));
  al(&all_ids[r], R_MAX * T_MAX * K_MAX * 2);
  Args& a = A[r];
  al(&a.x, T_MAX * H * 2);
  al(&a.topk, T_MAX * K_MAX * 4);
  al(&a.w, T_MAX * K_MAX * 4);
  al(&a.out, T_MAX * H * 2);
  al(&a.pos, (2 * T_MAX * R_MAX) * K_MAX * 4);
  al(&a.err, 4);
  a.base = base[r];
  a.rank = r;
  a.R = R;
  a.ids = all_ids[r];
}
void Ranks::load(const Case& wanted) {
  c = wanted;
  in = make_inputs(c, R);
  for (int r = 0; r < R; r++) {
    CK(cudaSetDevice(r));
    Args& a = A[r];
    memcpy(a.p, P, sizeof(P));
    a.L = c.E / R;
    a.T = c.T;
    a.k = c.k;
    auto put = [](const void* to, const auto& from) {
      CK(cudaMemcpy((void*)to, from.data(), from.size() * sizeof(from[0]), cudaMemcpyHostToDevice));
    };
    put(a.x, in.x[r]);
    put(a.topk, in.topk[r]);
    put(a.w, in.w[r]);
    put(all_ids[r], in.all);
    put(a.pos + (size_t)T_MAX * R_MAX * K_MAX, own_places(c, in, r));
    CK(cudaDeviceSynchronize());
  }
}
// What another draft or grid left would pass the check, and flags of another draft lie elsewhere.
void Ranks::clear() {
  for (int r = 0; r < R; r++) {
    CK(cudaSetDevice(r));
    CK(cudaMemset(P[r].pflag, 0, 2 * T_MAX * R_MAX * 2 * 4));
    CK(cudaMemset(P[r].y, 0, yrows * H * 2));
    CK(cudaMemset(P[r].x8, 0, yrows * H));
    CK(cudaMemset(A[r].out, 0, (size_t)T_MAX * H * 2));
    CK(cudaDeviceSynchronize());
  }
}
bool Ranks::check(const Pair& pair) {
  clear();
  replay(pair.name, pair.dispatch, 1, 1);
  for (int r = 0; r < R; r++) {
    CK(cudaSetDevice(r));
    dequant<<<512, 256>>>(A[r]);
    CK(cudaDeviceSynchronize());
  }
  replay(pair.name, pair.combine, 1, 1);
  double worst = 0;
  for (int r = 0; r < R; r++) {
    CK(cudaSetDevice(r));
    std::vector<__nv_bfloat16> out((size_t)c.T * H);
    CK(cudaMemcpy(out.data(), A[r].out, out.size() * 2, cudaMemcpyDeviceToHost));
    worst = std::max(worst, calc_diff(c, in, r, out));
  }
  const bool right = worst < 9e-4;
  printf("   check %-16s calc_diff %.2e %s\n", pair.name, worst, right ? "ok" : "WRONG");
  fflush(stdout);
  return right;
}
double Ranks::replay_rank(int r, const Launch& launch, int steps, int replays, std::barrier<>& together) {
  CK(cudaSetDevice(r));
  cudaGraph_t g;
  cudaGraphExec_t x;
  CK(cudaStreamBeginCapture(S[r], cudaStreamCaptureModeThreadLocal));
  Args a = A[r];
  for (int i = 0; i < steps; i++) {
    a.step = i;
    launch(a, S[r]);
    CK(cudaGetLastError());
  }
  bump<<<1, 1, 0, S[r]>>>(base[r], steps);
  CK(cudaStreamEndCapture(S[r], &g));
  CK(cudaGraphInstantiate(&x, g, 0));
  cudaEvent_t begin, end;
  CK(cudaEventCreate(&begin));
  CK(cudaEventCreate(&end));
  std::vector<float> us;
  for (int i = 0; i < replays; i++) {
    together.arrive_and_wait();
    CK(cudaEventRecord(begin, S[r]));
    CK(cudaGraphLaunch(x, S[r]));
    CK(cudaEventRecord(end, S[r]));
    CK(cudaStreamSynchronize(S[r]));
    float ms;
    CK(cudaEventElapsedTime(&ms, begin, end));
    us.push_back(ms * 1000 / steps);
  }
  std::sort(us.begin(), us.end());
  CK(cudaEventDestroy(begin));
  CK(cudaEventDestroy(end));
  CK(cudaGraphExecDestroy(x));
  CK(cudaGraphDestroy(g));
  return us[us.size() / 2];
}
double Ranks::replay(const char* name, const Launch& launch, int steps, int replays) {
  std::barrier together(R);
  std::vector<double> us(R);
  std::vector<std::thread> threads;
  for (int r = 0; r < R; r++)
    threads.emplace_back([&, r] { us[r] = replay_rank(r, launch, steps, replays, together); });
  for (auto& thread : threads) thread.join();
  for (int r = 0; r < R; r++) {
    int code;
    CK(cudaSetDevice(r));
    CK(cudaMemcpy(&code, A[r].err, 4, cudaMemcpyDeviceToHost));
    if (code) {
      printf("TIMEOUT rank %d code %d in %s\n", r, code, name);
      fflush(stdout);
      exit(2);
    }
  }
  return *std::max_element(us.begin(), us.end());
}
void Ranks::time(const char* name, int grid, const Launch& launch) {
  const double us = replay(name, launch, 20, 12);
  printf("T %4d E %3d k %d G %3d %-23s %7.2f us\n", c.T, c.E, c.k, grid, name, us);
  fflush(stdout);
}

// Whether every pair was right.
bool measure(Ranks& ranks, int R, const Case& c, int grid) {
  // The kernel's own row, then the ids of all ranks.
  const int ids = R * c.T * c.k * 2 + 64, counted_bytes = 7424 + ids, indexed_bytes = 7552 + ids;
  const auto with = [grid](auto kernel, int bytes) {
    return [=](const Args& a, cudaStream_t s) { kernel<<<grid, NT, bytes, s>>>(a); };
  };
  const Draft counted{"dispatch counted", with(dispatch_counted, counted_bytes)};
  const Draft indexed{"dispatch indexed", with(dispatch_indexed, indexed_bytes)};
  const Draft pull{"combine pull", with(combine_pull, 0)};
  const Draft push{"combine push", with(combine_push, 4 * H * 2)};
  const Draft stores{"combine stores", with(combine_stores, 0)};
  bool right = true;
  for (const Pair& pair :
       {Pair{"pair counted+pull", counted.launch, pull.launch}, Pair{"pair counted+push", counted.launch, push.launch},
        Pair{"pair indexed+stores", indexed.launch, stores.launch}}) {
    if (!ranks.check(pair)) {
      right = false;
      continue;
    }
    ranks.time(pair.name, grid, [&](const Args& a, cudaStream_t s) {
      pair.dispatch(a, s);
      pair.combine(a, s);
    });
  }
  for (const Draft& draft : {counted, indexed, pull, push, stores}) ranks.time(draft.name, grid, draft.launch);
  return right;
}

int main(int argc, char** argv) {
  const int R = argc > 1 ? atoi(argv[1]) : 8, tokens = argc > 2 ? atoi(argv[2]) : 0;
  if (R < 1 || R > R_MAX) {
    printf("GPUS is '%s', it must be 1 to %d\n", argv[1], R_MAX);
    return 1;
  }
  Ranks ranks(R);
  bool right = true;
  int measured = 0;
  for (const Case& c : {Case{1, 32 * R, 8}, Case{8, 32 * R, 8}, Case{32, 32 * R, 8}, Case{128, 32 * R, 8},
                        Case{128, 8, 2}, Case{128, 16, 2}}) {
    if (tokens != 0 && c.T != tokens) continue;
    if (c.E % R != 0) continue;  // experts are spread evenly
    ranks.load(c);
    for (int grid : {64, 128, 132})
      if (grid <= std::max(c.T * R, 64)) {
        right = measure(ranks, R, c, grid) && right;
        measured++;
      }
  }
  if (measured == 0) {
    printf("no case has %d tokens: 1, 8, 32 and 128 are known\n", tokens);
    return 1;
  }
  return right ? 0 : 1;
}
