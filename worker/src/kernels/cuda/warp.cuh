// The instructions of Ampere and later that C++ has no words for: tensor cores, and copies that run beside the program.
//
// A warp's 32 lanes are seen as 8 groups of 4: lane = 4 g + t. In terms of g and t, and with two bf16 in a register (the
// lower half first), the operands of one 16 x 8 x 16 product are
//   a  rows g, g + 8; columns 2t, 2t + 1, 2t + 8, 2t + 9:  a0 = (g, 2t..), a1 = (g + 8, 2t..), a2 = (g, 2t + 8..), a3
//   b  rows 2t, 2t + 1, 2t + 8, 2t + 9; column g:          b0 = (2t.., g), b1 = (2t + 8.., g)
//   c  rows g, g + 8; columns 2t, 2t + 1, in fp32:         c0, c1 = (g, 2t..), c2, c3 = (g + 8, 2t..)
#pragma once

#include "common.cuh"

constexpr unsigned WARP = 32;

// Where something is in shared memory, as the instructions below want it: in one register.
__device__ __forceinline__ unsigned shared_address(const void *pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of bf16 from shared memory. Lane l names row l % 8 of matrix l / 8, 16 bytes at a multiple of 16;
// it gets (g, 2t..) of each.
__device__ __forceinline__ void load_matrices(unsigned (&to)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// The same of the transposed matrices: each lane gets (2t.., g) of what lies there.
__device__ __forceinline__ void load_matrices_transposed(unsigned (&to)[4], unsigned row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(row)
                 : "memory");
}

// c += a b.
__device__ __forceinline__ void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy 16 bytes from global to shared memory, or to write zeros there. The address must be good either way.
__device__ __forceinline__ void copy_16(unsigned to, const void *from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 16 : 0)
                 : "memory");
}

// The same with 8 bytes.
__device__ __forceinline__ void copy_8(unsigned to, const void *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from),
                 "r"(there ? 8 : 0)
                 : "memory");
}

// Ends a group of copies, which may be empty.
__device__ __forceinline__ void end_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all of this thread's groups have arrived but the latest PENDING.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// The two numbers of a register.
__device__ __forceinline__ float low_half(unsigned both) {
    return __uint_as_float(both << 16);
}

__device__ __forceinline__ float high_half(unsigned both) {
    return __uint_as_float(both & 0xffff0000u);
}

// Among the 4 lanes of a group: register i of lane t becomes register t of lane i.
__device__ __forceinline__ void transpose_in_group(unsigned (&registers)[4]) {
#pragma unroll
    for (unsigned step = 1; step < 4; step *= 2) {
        const bool upper = threadIdx.x & step;
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            if (i & step) {
                continue;
            }
            const unsigned leaving = upper ? registers[i] : registers[i + step];
            const unsigned coming = __shfl_xor_sync(ALL_LANES, leaving, step);
            if (upper) {
                registers[i] = coming;
            } else {
                registers[i + step] = coming;
            }
        }
    }
}
