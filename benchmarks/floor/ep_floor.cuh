// The kernels of ep_floor: dispatch with one header a row, combine of rows summed at the experts' rank. Letters: H hidden size, R ranks,
// T tokens a rank, L experts a rank, k ids a token; e is the number of the operation, which every flag and cell carries.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int H = 7168, NT = 448, K_MAX = 8, R_MAX = 8, T_MAX = 256;
constexpr int GROUPS = H / 128;      // 56 scales
constexpr int MSG = H + GROUPS * 4;  // 7392 B, 16-aligned
struct Peer {                        // one rank's symmetric memory
  uint8_t* msg;                      // [2][R][T][MSG]
  uint32_t* flag;                    // [2][R][T]
  uint64_t* table;                   // [2][R][T*k/2 + ..] flag-in-data cells: {epoch<<32 | two int16 ids}
  uint8_t* x8;                       // [L][R*T][H]  expert-major fp8
  float* sc;                         // [L][GROUPS][R*T]
  __nv_bfloat16* y;                  // [L][R*T][H] expert outputs
  uint64_t* wcell;                   // [2][R][T*k] {epoch<<32 | float bits}
  __nv_bfloat16* part;               // [2][T][R][H] partial rows
  uint32_t* pflag;                   // [2][T][R]
};
struct Args {
  Peer p[R_MAX];
  const __nv_bfloat16* x;
  const int* topk;
  const float* w;
  __nv_bfloat16* out;
  int* pos;
  int* count;
  const uint32_t* base;
  int* err;
  int rank, R, L, T, k, step;
};
__device__ __forceinline__ uint64_t gtime() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}
__device__ __forceinline__ uint32_t ld_acq(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.acquire.sys.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void st_rel(uint32_t* p, uint32_t v) {
  asm volatile("st.release.sys.global.u32 [%0],%1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint64_t ld_vol(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.relaxed.sys.global.u64 %0,[%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void st_vol(uint64_t* p, uint64_t v) {
  asm volatile("st.relaxed.sys.global.u64 [%0],%1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ uint32_t smem(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void bulk_out(void* g, const void* s, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0],[%1],%2;" ::"l"(g), "r"(smem(s)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void fence_async_all() {
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ bool wait32(const uint32_t* p, uint32_t e, int* err, int code) {
  uint64_t t0 = 0;
  while ((int)(ld_acq(p) - e) < 0) {
    if (!t0)
      t0 = gtime();
    else if (gtime() - t0 > 2000000000ull) {
      atomicExch(err, code);
      return false;
    }
  }
  return true;
}
__device__ uint32_t wait_cell(const uint64_t* p, uint32_t e, int* err, int code) {
  uint64_t t0 = 0, v;
  while ((int)((uint32_t)((v = ld_vol(p)) >> 32) - e) < 0) {
    if (!t0)
      t0 = gtime();
    else if (gtime() - t0 > 2000000000ull) {
      atomicExch(err, code);
      return 0;
    }
  }
  return (uint32_t)v;
}

// ids of all sources -> smem tab[src][t][k] (int16); every rank broadcasts its table at the start of the op
__device__ void send_table(const Args& a, uint32_t e, int buf) {
  int cells = a.T * a.k / 2, n = cells * a.R;
  for (int i = blockIdx.x * NT + threadIdx.x; i < n; i += gridDim.x * NT) {
    int d = i / cells, c = i % cells;
    uint32_t v = (uint16_t)a.topk[2 * c] | ((uint32_t)(uint16_t)a.topk[2 * c + 1] << 16);
    st_vol(a.p[d].table + ((size_t)buf * R_MAX + a.rank) * (T_MAX * K_MAX / 2) + c, ((uint64_t)e << 32) | v);
  }
}
__device__ void recv_table(const Args& a, uint32_t e, int buf, uint32_t* tab) {
  int cells = a.T * a.k / 2;
  for (int i = threadIdx.x; i < cells * a.R; i += NT)
    tab[i] = wait_cell(a.p[a.rank].table + ((size_t)buf * R_MAX + i / cells) * (T_MAX * K_MAX / 2) + i % cells, e,
                       a.err, 100 + i / cells);
  __syncthreads();
}
// The sender puts the index inside (source, expert) into the header, one histogram gives the bases, a warp per row.
constexpr int HDR = 32;  // k x int16 index inside (src, expert)
__global__ void __launch_bounds__(NT, 1) dispatch(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t sm[];
  uint8_t* row = sm;
  uint32_t* tab = (uint32_t*)(sm + 7552);
  __shared__ int hist[R_MAX * 64];
  __shared__ int nidx[K_MAX];
  __shared__ int todo[64], cnt;
  uint32_t e = *a.base + a.step;
  int buf = e & 1, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, lo = a.rank * a.L;
  send_table(a, e, buf);
  for (int t = blockIdx.x; t < a.T; t += gridDim.x) {
    const uint4* src = (const uint4*)(a.x + (size_t)t * H) + tid * 2;
    uint4 v[2] = {src[0], src[1]};
    if (t != (int)blockIdx.x && tid < 32) bulk_wait_read();
    if (tid < K_MAX) nidx[tid] = 0;
    __syncthreads();
    for (int q = tid; q < t * a.k; q += NT) {
      int id = a.topk[q];
      for (int j = 0; j < a.k; j++)
        if (id == a.topk[t * a.k + j]) atomicAdd(&nidx[j], 1);
    }
    float f[16], m = 1e-4f;
    const __nv_bfloat162* b = (const __nv_bfloat162*)v;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float2 q = __bfloat1622float2(b[i]);
      f[2 * i] = q.x;
      f[2 * i + 1] = q.y;
      m = fmaxf(m, fmaxf(fabsf(q.x), fabsf(q.y)));
    }
#pragma unroll
    for (int o = 1; o < 8; o <<= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
    float s = 448.f / m;
    alignas(16) __nv_fp8x4_e4m3 q[4];
#pragma unroll
    for (int i = 0; i < 4; i++)
      q[i] = __nv_fp8x4_e4m3(make_float4(f[4 * i] * s, f[4 * i + 1] * s, f[4 * i + 2] * s, f[4 * i + 3] * s));
    ((uint4*)row)[tid] = *(uint4*)q;
    if (tid % 8 == 0) ((float*)(row + H))[tid / 8] = m * (1.f / 448.f);
    fence_async();
    __syncthreads();
    if (tid < 32) {
      if (tid < K_MAX) ((int16_t*)(row + MSG))[tid] = nidx[tid];
      fence_async();
      __syncwarp();
      int d = tid < a.k ? a.topk[t * a.k + tid] / a.L : -1 - tid;
      bool first = (__ffs(__match_any_sync(~0u, d)) - 1) == tid;
      if (first && d >= 0) {
        bulk_out(a.p[d].msg + (((size_t)buf * R_MAX + a.rank) * T_MAX + t) * (MSG + HDR), row, MSG + HDR);
        bulk_commit();
        bulk_wait();
        fence_async_all();
        st_rel(a.p[d].flag + ((size_t)buf * R_MAX + a.rank) * T_MAX + t, e);
      }
    }
  }
  for (int i = tid; i < R_MAX * 64; i += NT) hist[i] = 0;
  if (tid == 0) cnt = 0;
  recv_table(a, e, buf, tab);
  const int16_t* ids = (const int16_t*)tab;
  int n = a.R * a.T;
  for (int q = tid; q < n * a.k; q += NT) {
    int le = ids[q] - lo;
    if ((unsigned)le < (unsigned)a.L) atomicAdd(&hist[(q / a.k / a.T) * 64 + le], 1);
  }
  for (int p = blockIdx.x + gridDim.x * tid; p < n; p += gridDim.x * NT) {
    bool mine = false;
    for (int j = 0; j < a.k; j++) mine |= (unsigned)(ids[p * a.k + j] - lo) < (unsigned)a.L;
    if (mine) todo[atomicAdd(&cnt, 1)] = p;
  }
  __syncthreads();
  if (tid < a.L) {
    int acc = 0;
    for (int s = 0; s < a.R; s++) {
      int c = hist[s * 64 + tid];
      hist[s * 64 + tid] = acc;
      acc += c;
    }
  }
  __syncthreads();
  for (int i = warp; i < cnt; i += NT / 32) {
    int p = todo[i], src = p / a.T, t = p % a.T;
    if (lane == 0) wait32(a.p[a.rank].flag + ((size_t)buf * R_MAX + src) * T_MAX + t, e, a.err, 200 + src);
    __syncwarp();
    const uint8_t* m = a.p[a.rank].msg + (((size_t)buf * R_MAX + src) * T_MAX + t) * (MSG + HDR);
    uint4 v[14];
#pragma unroll
    for (int c = 0; c < 14; c++) v[c] = ((const uint4*)m)[c * 32 + lane];
    float s0 = ((const float*)(m + H))[lane], s1 = lane < GROUPS - 32 ? ((const float*)(m + H))[32 + lane] : 0.f;
    for (int j = 0; j < a.k; j++) {
      int le = ids[p * a.k + j] - lo;
      if ((unsigned)le >= (unsigned)a.L) continue;
      int pos = hist[src * 64 + le] + ((const int16_t*)(m + MSG))[j];
      size_t r = (size_t)le * n + pos;
#pragma unroll
      for (int c = 0; c < 14; c++) ((uint4*)(a.p[a.rank].x8 + r * H))[c * 32 + lane] = v[c];
      a.p[a.rank].sc[((size_t)le * GROUPS + lane) * n + pos] = s0;
      if (lane < GROUPS - 32) a.p[a.rank].sc[((size_t)le * GROUPS + 32 + lane) * n + pos] = s1;
      if (lane == 0) a.pos[p * a.k + j] = pos;
    }
  }
}
// a warp weighs and sums the rows of one (source, token) held here and stores the partial row straight to the owner
__global__ void __launch_bounds__(NT, 1) combine(const __grid_constant__ Args a) {
  uint32_t e = *a.base + a.step;
  int buf = e & 1, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, lo = a.rank * a.L;
  const int n = a.T * a.k;
  __shared__ int todo[64], cnt;
  if (tid == 0) cnt = 0;
  for (int i = blockIdx.x * NT + tid; i < n * a.R; i += gridDim.x * NT)
    st_vol(a.p[i / n].wcell + ((size_t)buf * R_MAX + a.rank) * (T_MAX * K_MAX) + i % n,
           ((uint64_t)e << 32) | __float_as_uint(a.w[i % n]));
  const int16_t* ids = (const int16_t*)(a.count);
  __syncthreads();
  for (int p = blockIdx.x + gridDim.x * tid; p < a.R * a.T; p += gridDim.x * NT) {
    bool mine = false;
    for (int j = 0; j < a.k; j++) mine |= (unsigned)(ids[p * a.k + j] - lo) < (unsigned)a.L;
    if (mine) todo[atomicAdd(&cnt, 1)] = p;
  }
  __syncthreads();
  for (int i = warp; i < 2 * cnt; i += NT / 32) {  // two warps a row
    int p = todo[i >> 1], half = i & 1, src = p / a.T, t = p % a.T;
    float w = 0.f;
    int le = -1, pos = 0;
    if (lane < a.k) {
      le = ids[p * a.k + lane] - lo;
      if ((unsigned)le < (unsigned)a.L) {
        w = __uint_as_float(wait_cell(
            a.p[a.rank].wcell + ((size_t)buf * R_MAX + src) * (T_MAX * K_MAX) + t * a.k + lane, e, a.err, 400 + src));
        pos = a.pos[p * a.k + lane];
      } else
        le = -1;
    }
    unsigned here = __ballot_sync(~0u, le >= 0);
    uint4* dst = (uint4*)(a.p[src].part + (((size_t)buf * T_MAX + t) * R_MAX + a.rank) * H) + half * 448;
    for (int c = 0; c < 14; c += 7) {
      float acc[7][8] = {};
      for (unsigned h = here; h; h &= h - 1) {
        int j = __ffs(h) - 1;
        float wj = __shfl_sync(~0u, w, j);
        int lj = __shfl_sync(~0u, le, j), pj = __shfl_sync(~0u, pos, j);
        const uint4* s = (const uint4*)(a.p[a.rank].y + ((size_t)lj * a.R * a.T + pj) * H) + half * 448 + c * 32 + lane;
        uint4 v[7];
#pragma unroll
        for (int u = 0; u < 7; u++) v[u] = s[u * 32];
#pragma unroll
        for (int u = 0; u < 7; u++) {
          const __nv_bfloat162* b = (const __nv_bfloat162*)&v[u];
#pragma unroll
          for (int z = 0; z < 4; z++) {
            float2 q = __bfloat1622float2(b[z]);
            acc[u][2 * z] = fmaf(wj, q.x, acc[u][2 * z]);
            acc[u][2 * z + 1] = fmaf(wj, q.y, acc[u][2 * z + 1]);
          }
        }
      }
#pragma unroll
      for (int u = 0; u < 7; u++) {
        alignas(16) __nv_bfloat162 o[4];
#pragma unroll
        for (int z = 0; z < 4; z++) o[z] = __floats2bfloat162_rn(acc[u][2 * z], acc[u][2 * z + 1]);
        dst[(c + u) * 32 + lane] = *(uint4*)o;
      }
    }
    __syncwarp();
    if (lane == 0) st_rel(a.p[src].pflag + (((size_t)buf * T_MAX + t) * R_MAX + a.rank) * 2 + half, e);
  }
  for (int t = blockIdx.x; t < a.T; t += gridDim.x) {
    unsigned mask = 0;
    for (int j = 0; j < a.k; j++) mask |= 1u << (a.topk[t * a.k + j] / a.L);
    if (tid < a.R * 2 && (mask >> (tid >> 1) & 1))
      wait32(a.p[a.rank].pflag + (((size_t)buf * T_MAX + t) * R_MAX) * 2 + tid, e, a.err, 500 + tid);
    __syncthreads();
    uint4 v[R_MAX][2];
    float acc[16] = {};
#pragma unroll
    for (int r = 0; r < R_MAX; r++)
      if (mask >> r & 1) {
        const uint4* s = (const uint4*)(a.p[a.rank].part + (((size_t)buf * T_MAX + t) * R_MAX + r) * H) + tid * 2;
        v[r][0] = s[0];
        v[r][1] = s[1];
      }
#pragma unroll
    for (int r = 0; r < R_MAX; r++)
      if (mask >> r & 1) {
        const __nv_bfloat162* b = (const __nv_bfloat162*)v[r];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          float2 q = __bfloat1622float2(b[i]);
          acc[2 * i] += q.x;
          acc[2 * i + 1] += q.y;
        }
      }
    alignas(16) __nv_bfloat162 o[8];
#pragma unroll
    for (int i = 0; i < 8; i++) o[i] = __floats2bfloat162_rn(acc[2 * i], acc[2 * i + 1]);
    ((uint4*)(a.out + (size_t)t * H))[tid * 2] = ((uint4*)o)[0];
    ((uint4*)(a.out + (size_t)t * H))[tid * 2 + 1] = ((uint4*)o)[1];
  }
}
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
