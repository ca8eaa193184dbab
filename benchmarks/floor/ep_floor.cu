// Floor: how low can expert-parallel dispatch and combine go over NVLink? One process, a thread a GPU, graph-replayed chains of 20 operations.
// A plain draft to measure beside: fixed hidden size 7168, at most 128 tokens, no faults, no masks.
// Run: ep_floor GPUS
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "ep_floor.cuh"

#define CK(x)                                                           \
  do {                                                                  \
    cudaError_t e_ = (x);                                               \
    if (e_ != cudaSuccess) {                                            \
      printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); \
      fflush(stdout);                                                   \
      exit(1);                                                          \
    }                                                                   \
  } while (0)

int main(int argc, char** argv) {
  int R = argc > 1 ? atoi(argv[1]) : 8;
  struct Cfg {
    int T, E, k;
  };
  std::vector<Cfg> cfgs = {{1, 32 * R, 8},   {8, 32 * R, 8}, {32, 32 * R, 8},
                           {128, 32 * R, 8}, {128, 8, 2},    {128, 16, 2}};
  Peer P[R_MAX];
  std::vector<Args> A(R);
  std::vector<cudaStream_t> S(R);
  std::vector<uint32_t*> base(R);
  std::vector<int*> tabg(R);
  size_t yrows = (size_t)32 * R * 128;  // L<=32, T<=128 here
  for (int r = 0; r < R; r++) {
    CK(cudaSetDevice(r));
    for (int q = 0; q < R; q++)
      if (q != r) CK(cudaDeviceEnablePeerAccess(q, 0));
    auto al = [&](auto** p, size_t n) {
      CK(cudaMalloc((void**)p, n));
      CK(cudaMemset(*p, 0, n));
    };
    al(&P[r].msg, 2ull * R_MAX * T_MAX * (MSG + 32));
    al(&P[r].flag, 2 * R_MAX * T_MAX * 4);
    al(&P[r].table, 2 * R_MAX * T_MAX * K_MAX / 2 * 8);
    al(&P[r].x8, yrows * H);
    al(&P[r].sc, yrows * GROUPS * 4);
    al(&P[r].y, yrows * H * 2);
    al(&P[r].wcell, 2 * R_MAX * T_MAX * K_MAX * 8);
    al(&P[r].part, 2ull * T_MAX * R_MAX * H * 2);
    al(&P[r].pflag, 2 * T_MAX * R_MAX * 2 * 4);
    al(&base[r], 4);
    uint32_t one = 1;
    CK(cudaMemcpy(base[r], &one, 4, cudaMemcpyHostToDevice));
    al(&tabg[r], R_MAX * T_MAX * K_MAX * 2);
    CK(cudaStreamCreateWithFlags(&S[r], cudaStreamNonBlocking));
    al((uint8_t**)&A[r].x, T_MAX * H * 2);
    al((uint8_t**)&A[r].topk, T_MAX * K_MAX * 4);
    al((uint8_t**)&A[r].w, T_MAX * K_MAX * 4);
    al(&A[r].out, T_MAX * H * 2);
    al(&A[r].pos, (2 * T_MAX * R_MAX) * K_MAX * 4);
    al(&A[r].err, 4);
    A[r].base = base[r];
    A[r].rank = r;
    A[r].R = R;
    A[r].count = tabg[r];
    CK(cudaFuncSetAttribute(dispatch, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000));
  }
  for (auto c : cfgs) {
    int T = c.T, k = c.k, L = c.E / R;
    std::vector<std::vector<int>> tk(R);
    std::vector<std::vector<float>> w(R);
    std::vector<std::vector<__nv_bfloat16>> x(R);
    std::vector<int16_t> all((size_t)R * T * k);
    for (int r = 0; r < R; r++) {
      std::mt19937 g(7 * r + T);
      std::normal_distribution<float> nd;
      tk[r].resize(T * k);
      w[r].resize(T * k);
      x[r].resize((size_t)T * H);
      for (auto& v : x[r]) v = __float2bfloat16(nd(g) * 0.1f);
      for (int t = 0; t < T; t++) {
        std::vector<int> ids(c.E);
        for (int i = 0; i < c.E; i++) ids[i] = i;
        std::shuffle(ids.begin(), ids.end(), g);
        for (int j = 0; j < k; j++) {
          tk[r][t * k + j] = ids[j];
          w[r][t * k + j] = 0.1f + (g() % 100) / 100.f;
          all[((size_t)r * T + t) * k + j] = ids[j];
        }
      }
    }
    for (int r = 0; r < R; r++) {
      CK(cudaSetDevice(r));
      Args& a = A[r];
      memcpy(a.p, P, sizeof(P));
      a.L = L;
      a.T = T;
      a.k = k;
      CK(cudaMemcpy((void*)a.x, x[r].data(), x[r].size() * 2, cudaMemcpyHostToDevice));
      CK(cudaMemcpy((void*)a.topk, tk[r].data(), T * k * 4, cudaMemcpyHostToDevice));
      CK(cudaMemcpy((void*)a.w, w[r].data(), T * k * 4, cudaMemcpyHostToDevice));
      CK(cudaMemcpy(tabg[r], all.data(), all.size() * 2, cudaMemcpyHostToDevice));
      CK(cudaDeviceSynchronize());
    }
    for (int G : {64, 128, 132}) {
      if (G > std::max(T * R, 64)) continue;
      auto run = [&](const char* name, auto launch, int N, bool report) {
        std::barrier bar(R);
        std::vector<double> us(R);
        std::vector<std::thread> th;
        for (int r = 0; r < R; r++)
          th.emplace_back([&, r] {
            CK(cudaSetDevice(r));
            cudaGraph_t g;
            cudaGraphExec_t x;
            CK(cudaStreamBeginCapture(S[r], cudaStreamCaptureModeThreadLocal));
            Args a = A[r];
            for (int i = 0; i < N; i++) {
              a.step = i;
              launch(a, S[r]);
            }
            bump<<<1, 1, 0, S[r]>>>(base[r], N);
            CK(cudaStreamEndCapture(S[r], &g));
            CK(cudaGraphInstantiate(&x, g, 0));
            cudaEvent_t e0, e1;
            CK(cudaEventCreate(&e0));
            CK(cudaEventCreate(&e1));
            std::vector<float> v;
            for (int it = 0; it < (report ? 12 : 1); it++) {
              bar.arrive_and_wait();
              CK(cudaEventRecord(e0, S[r]));
              CK(cudaGraphLaunch(x, S[r]));
              CK(cudaEventRecord(e1, S[r]));
              CK(cudaStreamSynchronize(S[r]));
              float ms;
              CK(cudaEventElapsedTime(&ms, e0, e1));
              v.push_back(ms * 1000 / N);
            }
            std::sort(v.begin(), v.end());
            us[r] = v[v.size() / 2];
            CK(cudaGraphExecDestroy(x));
            CK(cudaGraphDestroy(g));
          });
        for (auto& t : th) t.join();
        for (int r = 0; r < R; r++) {
          int er;
          CK(cudaSetDevice(r));
          CK(cudaMemcpy(&er, A[r].err, 4, cudaMemcpyDeviceToHost));
          if (er) {
            printf("TIMEOUT rank %d code %d in %s\n", r, er, name);
            fflush(stdout);
            exit(2);
          }
        }
        if (report) {
          printf("T %4d E %3d k %d G %3d %-16s %7.2f us\n", T, c.E, k, G, name,
                 *std::max_element(us.begin(), us.end()));
          fflush(stdout);
        }
      };
      dim3 gd(G), bl(NT);
      auto send = [&](Args a, cudaStream_t s) { dispatch<<<gd, bl, 7552 + R * T * k * 2 + 64, s>>>(a); };
      auto sum = [&](Args a, cudaStream_t s) { combine<<<gd, bl, 0, s>>>(a); };
      auto check = [&] {
        double worst = 0;
        for (int r = 0; r < R; r++) {
          CK(cudaSetDevice(r));
          std::vector<__nv_bfloat16> o((size_t)T * H);
          CK(cudaMemcpy(o.data(), A[r].out, o.size() * 2, cudaMemcpyDeviceToHost));
          double xy = 0, xx = 0;
          for (int t = 0; t < T; t++) {
            float sw = 0;
            for (int j = 0; j < k; j++) sw += w[r][t * k + j];
            for (int i = 0; i < H; i++) {
              double A1 = __bfloat162float(x[r][(size_t)t * H + i]) * sw + 1,
                     B1 = __bfloat162float(o[(size_t)t * H + i]) + 1;
              xy += A1 * B1;
              xx += A1 * A1 + B1 * B1;
            }
          }
          worst = std::max(worst, 1 - 2 * xy / xx);
          CK(cudaMemset(A[r].out, 0, (size_t)T * H * 2));
        }
        printf("   check calc_diff %.2e %s\n", worst, worst < 9e-4 ? "ok" : "WRONG");
        fflush(stdout);
      };
      for (int r = 0; r < R; r++) {  // what the grid before left would pass the check
        CK(cudaSetDevice(r));
        CK(cudaMemset(P[r].y, 0, yrows * H * 2));
        CK(cudaMemset(P[r].x8, 0, yrows * H));
        CK(cudaDeviceSynchronize());
      }
      run("dispatch", send, 1, false);
      for (int r = 0; r < R; r++) {
        CK(cudaSetDevice(r));
        dequant<<<512, 256>>>(A[r]);
        CK(cudaDeviceSynchronize());
      }
      run("combine", sum, 1, false);
      check();
      run("dispatch", send, 20, true);
      run("combine", sum, 20, true);
      run(
          "pair",
          [&](Args a, cudaStream_t s) {
            send(a, s);
            sum(a, s);
          },
          20, true);
    }
  }
}
