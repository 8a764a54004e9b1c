// The PTX instructions of the matrix kernels, as functions. Without torch.
//
// Shared memory is addressed by 32-bit numbers, as the instructions take them; no kernel that uses
// this header touches it by any other way. Tests replace the functions by host code of the same
// meaning (tests/aot/cuda_on_host/cuda_ptx_on_host.h), so that nothing but this and element.cuh may
// contain PTX.
#pragma once

#include <cstdint>

#include "deeplab_fast/element.cuh"

#if defined(__CUDACC__)

#include <cuda.h>

#include <type_traits>

namespace deeplab_fast::cuda::ptx {

// The description of a tensor for the copy engine: a __grid_constant__ parameter of the kernel.
using TensorMap = CUtensorMap;

// The first byte of the dynamic shared memory.
__device__ inline uint32_t dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char deeplab_fast_dynamic[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(deeplab_fast_dynamic));
}

__device__ inline uint32_t shuffle_xor(uint32_t value, int lanes) {
  return __shfl_xor_sync(0xffffffffu, value, lanes);
}

// Asynchronous copies of 16 bytes by a thread; zeros where the source is not `real`, which then is
// not read.

__device__ inline void copy_async(uint32_t to, const void* from, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(__cvta_generic_to_global(from)), "r"(real ? 16 : 0)
               : "memory");
}

__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all but the last `kPending` groups of this thread have arrived.
template <int kPending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Matrix products of a warp.

// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from)
               : "memory");
}

#define DEEPLAB_FAST_MMA(types)                                                       \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." types                         \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d [16, 8] += a [16, 16] b^T, b [8, 16].
template <typename T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, Half>) {
    DEEPLAB_FAST_MMA("f16.f16");
  } else {
    DEEPLAB_FAST_MMA("bf16.bf16");
  }
}

#undef DEEPLAB_FAST_MMA

// What follows needs sm_90, and wgmma and the register counts sm_90a.

// Barriers in shared memory. A phase ends when `count` arrivals and all expected bytes have come.

__device__ inline void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

// Makes initialised barriers known to the copy engine and to the other blocks of the cluster, once
// all have met.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// At the barrier that block `rank` of the cluster has at the same address.
__device__ inline void barrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ inline void barrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// One arrival, when all earlier copy_async of this thread have landed.
__device__ inline void barrier_arrive_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

#define DEEPLAB_FAST_BARRIER_WAIT(order)   \
  asm volatile(                            \
      "{\n.reg .pred done;\n"              \
      "AGAIN:\n"                           \
      "mbarrier.try_wait.parity" order     \
      ".shared::cta.b64 done, [%0], %1;\n" \
      "@done bra DONE;\n"                  \
      "bra AGAIN;\n"                       \
      "DONE:\n}" ::"r"(barrier),           \
      "r"(parity)                          \
      : "memory")

// Until the phase of this parity has ended.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  DEEPLAB_FAST_BARRIER_WAIT("");
}

// The same, after what other blocks of the cluster did before they arrived.
__device__ inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  DEEPLAB_FAST_BARRIER_WAIT(".acquire.cluster");
}

#undef DEEPLAB_FAST_BARRIER_WAIT

// The copy engine.

__device__ inline void prefetch(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box of the map at (column, row) to shared memory; its bytes count at the barrier.
__device__ inline void load_box(uint32_t to, const TensorMap* map, int column, int row,
                                uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// The same for every block of the cluster in `blocks`, at the same addresses in each.
__device__ inline void load_box_multicast(uint32_t to, const TensorMap* map, int column, int row,
                                          uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(blocks)
      : "memory");
}

// Orders what this thread knows to be written by threads (copy_async is such a write) before what
// the tensor cores and the copy engine read.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Registers of each thread of a warpgroup.

template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Matrix products of a warpgroup, which run until wgmma_wait says that they are done.

__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

#define DEEPLAB_FAST_D4(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define DEEPLAB_FAST_D16(i) \
  DEEPLAB_FAST_D4(i), DEEPLAB_FAST_D4(i + 1), DEEPLAB_FAST_D4(i + 2), DEEPLAB_FAST_D4(i + 3)
#define DEEPLAB_FAST_D64(i) \
  DEEPLAB_FAST_D16(i), DEEPLAB_FAST_D16(i + 4), DEEPLAB_FAST_D16(i + 8), DEEPLAB_FAST_D16(i + 12)

// Keeps the compiler from moving uses of the accumulators across.
template <int kBlocks>
__device__ inline void wgmma_hold(float (&d)[kBlocks][4]) {
  static_assert(kBlocks % 16 == 0);
#pragma unroll
  for (int i = 0; i < kBlocks; i += 16) asm volatile("" : DEEPLAB_FAST_D64(i)::"memory");
}

// Before a product, what threads wrote to registers that it uses.
__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Until all but the last `kPending` groups are done.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

#define DEEPLAB_FAST_R0                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DEEPLAB_FAST_R64                                                                 \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "     \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "     \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "     \
  "%110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, " \
  "%124, %125, %126, %127"
#define DEEPLAB_FAST_WGMMA(n, types, registers, a_at, b_at, p_at, ...)                          \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " p_at                                     \
               ", 0;\n"                                                                         \
               "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." types " {" registers "}, " a_at \
               ", " b_at ", add, 1, 1, 0, 0;\n}"                                                \
               : __VA_ARGS__                                                                    \
               : "l"(a), "l"(b), "r"(static_cast<int>(add)))
#define DEEPLAB_FAST_WGMMA_128(types) \
  DEEPLAB_FAST_WGMMA("128", types, DEEPLAB_FAST_R0, "%64", "%65", "%66", DEEPLAB_FAST_D64(0))
#define DEEPLAB_FAST_WGMMA_256(types)                                                             \
  DEEPLAB_FAST_WGMMA("256", types, DEEPLAB_FAST_R0 ", " DEEPLAB_FAST_R64, "%128", "%129", "%130", \
                     DEEPLAB_FAST_D64(0), DEEPLAB_FAST_D64(16))

// d [64, 8 kBlocks] = a [64, 16] b^T (+ d), with b [8 kBlocks, 16], given by descriptors.
template <typename T, int kBlocks>
__device__ inline void wgmma(float (&d)[kBlocks][4], uint64_t a, uint64_t b, bool add) {
  static_assert(kBlocks == 16 || kBlocks == 32);
  constexpr bool kHalf = std::is_same_v<T, Half>;
  if constexpr (kBlocks == 16 && kHalf) {
    DEEPLAB_FAST_WGMMA_128("f16.f16");
  } else if constexpr (kBlocks == 16) {
    DEEPLAB_FAST_WGMMA_128("bf16.bf16");
  } else if constexpr (kHalf) {
    DEEPLAB_FAST_WGMMA_256("f16.f16");
  } else {
    DEEPLAB_FAST_WGMMA_256("bf16.bf16");
  }
}

#undef DEEPLAB_FAST_D4
#undef DEEPLAB_FAST_D16
#undef DEEPLAB_FAST_D64
#undef DEEPLAB_FAST_R0
#undef DEEPLAB_FAST_R64
#undef DEEPLAB_FAST_WGMMA
#undef DEEPLAB_FAST_WGMMA_128
#undef DEEPLAB_FAST_WGMMA_256

}  // namespace deeplab_fast::cuda::ptx

#endif  // __CUDACC__
