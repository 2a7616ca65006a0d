// Kernels that begin before the one before them has ended (programmatic dependent launch, Hopper and later): what does not
// depend on it, above all the weights, is fetched in the meantime.
#pragma once

#include "common.cuh"

// Before the first access to anything that an earlier kernel writes or reads. Every block comes here, so a kernel that has ended tells
// that all before it have.
__device__ __forceinline__ void await_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks take the room that this one's leave.
__device__ __forceinline__ void admit_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Sixteen bytes that are read once and never written while the kernel runs.
__device__ __forceinline__ uint4 load_once(const bf16 *at) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(at));
    return x;
}
