// Drafts of combine in ep_floor. The ids of all ranks are there already, as dispatch would leave them.
#pragma once
#include "ep_floor.cuh"

__device__ __forceinline__ uint4 ld_row(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ void send_weights(const Args& a, uint32_t e, int buf) {
  const int n = a.T * a.k;
  for (int i = blockIdx.x * NT + threadIdx.x; i < n * a.R; i += gridDim.x * NT)
    st_vol(a.p[i / n].wcell + ((size_t)buf * R_MAX + a.rank) * (T_MAX * K_MAX) + i % n,
           ((uint64_t)e << 32) | __float_as_uint(a.w[i % n]));
}
// Bit r: one of the experts of own token t is at rank r.
__device__ __forceinline__ unsigned ranks_of(const Args& a, int t) {
  unsigned mask = 0;
  for (int j = 0; j < a.k; j++) mask |= 1u << (a.topk[t * a.k + j] / a.L);
  return mask;
}
// The owner of a token loads its k rows from the experts' ranks, once all ranks have arrived: one hop less, every row on the link. Best for
// one token.
__global__ void __launch_bounds__(NT, 1) combine_pull(const __grid_constant__ Args a) {
  uint32_t e = *a.base + a.step;
  int tid = threadIdx.x;
  if (blockIdx.x == 0 && tid < a.R) st_rel(a.p[tid].ready + a.rank, e);
  if (tid < a.R) wait32(a.p[a.rank].ready + tid, e, a.err, 300 + tid);
  __syncthreads();
  for (int t = blockIdx.x; t < a.T; t += gridDim.x) {
    float acc[16] = {};
    uint4 v[K_MAX][2];
    float w[K_MAX];
#pragma unroll
    for (int j = 0; j < K_MAX; j++)
      if (j < a.k) {
        int id = a.topk[t * a.k + j];
        w[j] = a.w[t * a.k + j];
        const uint4* s = (const uint4*)(a.p[id / a.L].y +
                                        ((size_t)(id % a.L) * a.R * a.T + a.pos[(T_MAX * R_MAX + t) * K_MAX + j]) * H) +
                         tid * 2;
        v[j][0] = ld_row(s);
        v[j][1] = ld_row(s + 1);
      }
#pragma unroll
    for (int j = 0; j < K_MAX; j++)
      if (j < a.k) add_weighted(acc, w[j], v[j]);
    store_rounded(a.out + (size_t)t * H, acc);
  }
}
// The experts' rank weighs and sums its rows of a token, a block each, and sends the sum as a bulk copy; a block's flags follow its last
// copy. Best for some tokens.
__global__ void __launch_bounds__(NT, 1) combine_push(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t sm[];  // four sums on their way
  uint32_t e = *a.base + a.step;
  int buf = e & 1, tid = threadIdx.x, lo = a.rank * a.L, stage = 0;
  send_weights(a, e, buf);
  const int16_t* ids = (const int16_t*)a.ids;
  for (int p = blockIdx.x; p < a.R * a.T; p += gridDim.x) {
    int src = p / a.T, t = p % a.T;
    bool any = false;
    float acc[16] = {};
    for (int j = 0; j < a.k; j++) {
      int le = ids[p * a.k + j] - lo;
      if ((unsigned)le >= (unsigned)a.L) continue;
      const uint4* s = (const uint4*)(a.p[a.rank].y + ((size_t)le * a.R * a.T + a.pos[p * a.k + j]) * H) + tid * 2;
      uint4 v[2] = {s[0], s[1]};
      float w = __uint_as_float(wait_cell(
          a.p[a.rank].wcell + ((size_t)buf * R_MAX + src) * (T_MAX * K_MAX) + t * a.k + j, e, a.err, 400 + src));
      add_weighted(acc, w, v);
      any = true;
    }
    if (any) {
      uint8_t* st = sm + (stage & 3) * H * 2;
      if (tid == 0) bulk_wait_read_3();
      __syncthreads();
      store_rounded(st, acc);
      fence_async();
      __syncthreads();
      if (tid == 0) {
        bulk_out(a.p[src].part + (((size_t)buf * T_MAX + t) * R_MAX + a.rank) * H, st, H * 2);
        bulk_commit();
      }
      stage++;
    }
  }
  if (tid == 0) {
    bulk_wait();
    fence_async_all();
    for (int p = blockIdx.x; p < a.R * a.T; p += gridDim.x) {
      bool any = false;
      for (int j = 0; j < a.k; j++)
        if ((unsigned)(ids[p * a.k + j] - lo) < (unsigned)a.L) any = true;
      if (any) st_rel(a.p[p / a.T].pflag + ((size_t)buf * T_MAX + p % a.T) * R_MAX + a.rank, e);
    }
  }
  __syncthreads();
  for (int t = blockIdx.x; t < a.T; t += gridDim.x) {
    float acc[16] = {};
    unsigned mask = ranks_of(a, t);
    if (tid < a.R && (mask >> tid & 1))
      wait32(a.p[a.rank].pflag + ((size_t)buf * T_MAX + t) * R_MAX + tid, e, a.err, 500 + tid);
    __syncthreads();
    for (int r = 0; r < a.R; r++)
      if (mask >> r & 1) {
        const uint4* s = (const uint4*)(a.p[a.rank].part + (((size_t)buf * T_MAX + t) * R_MAX + r) * H) + tid * 2;
        uint4 v[2] = {s[0], s[1]};
        add(acc, v);
      }
    store_rounded(a.out + (size_t)t * H, acc);
  }
}
// The same sums, each by two warps that store them straight to the owner, with a flag for each half. Best for many tokens.
__global__ void __launch_bounds__(NT, 1) combine_stores(const __grid_constant__ Args a) {
  uint32_t e = *a.base + a.step;
  int buf = e & 1, tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, lo = a.rank * a.L;
  __shared__ int todo[64], cnt;
  if (tid == 0) cnt = 0;
  send_weights(a, e, buf);
  const int16_t* ids = (const int16_t*)a.ids;
  __syncthreads();
  list_rows(a, ids, lo, todo, cnt);
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
    unsigned mask = ranks_of(a, t);
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
      if (mask >> r & 1) add(acc, v[r]);
    store_rounded(a.out + (size_t)t * H, acc);
  }
}
