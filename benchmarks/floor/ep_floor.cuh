// What the kernels of ep_floor share. Letters: H hidden size, R ranks, T tokens a rank, L experts a rank, k ids a token; e is the number
// of the operation, which every flag and cell carries, so that two sets of buffers are enough and nothing is reset between operations.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

constexpr int H = 7168, NT = 448, K_MAX = 8, R_MAX = 8, T_MAX = 256;
constexpr int GROUPS = H / 128;      // 56 scales
constexpr int MSG = H + GROUPS * 4;  // 7392 B, 16-aligned
constexpr int HDR = 32;              // k x int16 index inside (source, expert)
struct Peer {                        // one rank's symmetric memory
  uint8_t* msg;                      // [2][R][T][MSG], with HDR behind each MSG of dispatch_indexed
  uint32_t* flag;                    // [2][R][T]
  uint64_t* table;                   // [2][R][T*k/2 + ..] flag-in-data cells: {epoch<<32 | two int16 ids}
  uint8_t* x8;                       // [L][R*T][H]  expert-major fp8
  float* sc;                         // [L][GROUPS][R*T]
  __nv_bfloat16* y;                  // [L][R*T][H] expert outputs
  uint64_t* wcell;                   // [2][R][T*k] {epoch<<32 | float bits}
  __nv_bfloat16* part;               // [2][T][R][H] partial rows
  uint32_t* pflag;                   // [2][T][R], or [2][T][R][2 halves] of combine_stores
  uint32_t* ready;                   // [R]
};
struct Args {
  Peer p[R_MAX];
  const __nv_bfloat16* x;
  const int* topk;
  const float* w;
  __nv_bfloat16* out;
  // [R][T][k] places that dispatch gave; from (T_MAX * R_MAX) * K_MAX on the host's [T][K_MAX]: own tokens' rows at their experts' ranks
  int* pos;
  const int* ids;  // [R][T][k] int16, of all ranks, from the host
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
__device__ __forceinline__ void bulk_wait_read_3() {
  asm volatile("cp.async.bulk.wait_group.read 3;" ::: "memory");
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
// FP8 of 16 values a thread, 8 threads (128 values) share the scale that comes back.
__device__ __forceinline__ float quantise(const uint4 (&v)[2], __nv_fp8x4_e4m3 (&q)[4]) {
  float f[16], m = 1e-4f;
  const __nv_bfloat162* b = (const __nv_bfloat162*)v;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float2 u = __bfloat1622float2(b[i]);
    f[2 * i] = u.x;
    f[2 * i + 1] = u.y;
    m = fmaxf(m, fmaxf(fabsf(u.x), fabsf(u.y)));
  }
#pragma unroll
  for (int o = 1; o < 8; o <<= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, o));
  float s = 448.f / m;
#pragma unroll
  for (int i = 0; i < 4; i++)
    q[i] = __nv_fp8x4_e4m3(make_float4(f[4 * i] * s, f[4 * i + 1] * s, f[4 * i + 2] * s, f[4 * i + 3] * s));
  return m * (1.f / 448.f);
}
// Every block takes (source, token) pairs round robin; the ids say which have a row here. The barriers before and after it are the caller's.
__device__ __forceinline__ void list_rows(const Args& a, const int16_t* ids, int lo, int* todo, int& cnt) {
  for (int p = blockIdx.x + gridDim.x * threadIdx.x; p < a.R * a.T; p += gridDim.x * NT) {
    bool mine = false;
    for (int j = 0; j < a.k; j++) mine |= (unsigned)(ids[p * a.k + j] - lo) < (unsigned)a.L;
    if (mine) todo[atomicAdd(&cnt, 1)] = p;
  }
}
__device__ __forceinline__ void add_weighted(float (&acc)[16], float w, const uint4 (&v)[2]) {
  const __nv_bfloat162* b = (const __nv_bfloat162*)v;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float2 q = __bfloat1622float2(b[i]);
    acc[2 * i] = fmaf(w, q.x, acc[2 * i]);
    acc[2 * i + 1] = fmaf(w, q.y, acc[2 * i + 1]);
  }
}
__device__ __forceinline__ void add(float (&acc)[16], const uint4 (&v)[2]) {
  const __nv_bfloat162* b = (const __nv_bfloat162*)v;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float2 q = __bfloat1622float2(b[i]);
    acc[2 * i] += q.x;
    acc[2 * i + 1] += q.y;
  }
}
__device__ __forceinline__ void store_rounded(void* row, const float (&acc)[16]) {
  alignas(16) __nv_bfloat162 o[8];
#pragma unroll
  for (int i = 0; i < 8; i++) o[i] = __floats2bfloat162_rn(acc[2 * i], acc[2 * i + 1]);
  int tid = threadIdx.x;
  ((uint4*)row)[tid * 2] = ((uint4*)o)[0];
  ((uint4*)row)[tid * 2 + 1] = ((uint4*)o)[1];
}
