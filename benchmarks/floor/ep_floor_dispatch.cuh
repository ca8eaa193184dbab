// Drafts of dispatch in ep_floor: a row of FP8 and scales goes once to every rank that holds one of its experts, by a bulk copy with a
// flag behind it; the receiver spreads it over its experts. They differ in who finds a row's place among its expert's rows.
#pragma once
#include "ep_floor.cuh"

// The receiver counts, in the ids of all ranks, the entries before each row; a block a row. Best for few tokens.
__global__ void __launch_bounds__(NT, 1) dispatch_counted(const __grid_constant__ Args a) {
  extern __shared__ __align__(128) uint8_t sm[];
  uint8_t* row = sm;                       // MSG
  uint32_t* tab = (uint32_t*)(sm + 7424);  // R*T*k/2 words
  __shared__ int npos[64], todo[64], cnt;
  uint32_t e = *a.base + a.step;
  int buf = e & 1, tid = threadIdx.x;
  send_table(a, e, buf);
  for (int t = blockIdx.x; t < a.T; t += gridDim.x) {
    const uint4* src = (const uint4*)(a.x + (size_t)t * H) + tid * 2;
    uint4 v[2] = {src[0], src[1]};
    alignas(16) __nv_fp8x4_e4m3 q[4];
    float scale = quantise(v, q);
    if (tid < 32) bulk_wait_read();
    __syncthreads();
    ((uint4*)row)[tid] = *(uint4*)q;
    if (tid % 8 == 0) ((float*)(row + H))[tid / 8] = scale;
    fence_async();
    __syncthreads();
    if (tid < 32) {
      int d = tid < a.k ? a.topk[t * a.k + tid] / a.L : -1 - tid;
      bool first = (__ffs(__match_any_sync(~0u, d)) - 1) == tid;
      if (first && d >= 0) {
        bulk_out(a.p[d].msg + (((size_t)buf * R_MAX + a.rank) * T_MAX + t) * MSG, row, MSG);
        bulk_commit();
        bulk_wait();
        fence_async_all();
        st_rel(a.p[d].flag + ((size_t)buf * R_MAX + a.rank) * T_MAX + t, e);
      }
    }
  }
  recv_table(a, e, buf, tab);
  const int16_t* ids = (const int16_t*)tab;
  int lo = a.rank * a.L;
  if (tid == 0) cnt = 0;
  __syncthreads();
  list_rows(a, ids, lo, todo, cnt);
  __syncthreads();
  for (int n = 0; n < cnt; n++) {
    int p = todo[n], src = p / a.T, t = p % a.T;
    if (tid < a.k) npos[tid] = 0;
    __syncthreads();
    for (int q = tid; q < p * a.k; q += NT) {
      int id = ids[q];
      for (int j = 0; j < a.k; j++)
        if (id == ids[p * a.k + j] && (unsigned)(id - lo) < (unsigned)a.L) atomicAdd(&npos[j], 1);
    }
    if (tid == 0) wait32(a.p[a.rank].flag + ((size_t)buf * R_MAX + src) * T_MAX + t, e, a.err, 200 + src);
    __syncthreads();
    const uint8_t* m = a.p[a.rank].msg + (((size_t)buf * R_MAX + src) * T_MAX + t) * MSG;
    uint4 v = ((const uint4*)m)[tid];
    float s = tid < GROUPS ? ((const float*)(m + H))[tid] : 0.f;
    for (int j = 0; j < a.k; j++) {
      int le = ids[p * a.k + j] - lo;
      if ((unsigned)le >= (unsigned)a.L) continue;
      size_t r = (size_t)le * a.R * a.T + npos[j];
      ((uint4*)(a.p[a.rank].x8 + r * H))[tid] = v;
      if (tid < GROUPS) a.p[a.rank].sc[((size_t)le * GROUPS + tid) * a.R * a.T + npos[j]] = s;
      if (tid == 0) a.pos[p * a.k + j] = npos[j];
    }
    __syncthreads();
  }
}
// The sender puts the index inside (source, expert) into the header, one histogram gives the bases, a warp a row. Best for many tokens.
__global__ void __launch_bounds__(NT, 1) dispatch_indexed(const __grid_constant__ Args a) {
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
    alignas(16) __nv_fp8x4_e4m3 q[4];
    float scale = quantise(v, q);
    ((uint4*)row)[tid] = *(uint4*)q;
    if (tid % 8 == 0) ((float*)(row + H))[tid / 8] = scale;
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
  list_rows(a, ids, lo, todo, cnt);
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
