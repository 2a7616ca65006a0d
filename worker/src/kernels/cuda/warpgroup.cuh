// The instructions of Hopper that C++ has no words for: matrix products of a warpgroup, four warps together, whose operands
// lie in shared memory.
//
// A product is 64 rows by N columns by 16; each warp gets 16 rows of it, its lanes hold of every 8 columns what they hold
// of a warp's product (warp.cuh). Operands come in one of two forms:
//   tiles   rows of 64 bf16, 128 bytes, whose eight vectors are mixed by the row's number; wider ones as panels of 64
//           columns, one behind the other. Either axis may be the one that is summed over.
//   states  blocks of 8 x 8, 128 bytes each, one row of blocks behind the other.
#pragma once

#include "warp.cuh"

// COUNT rows of WIDTH bf16 in shared memory, at a multiple of 1024.
template <unsigned COUNT, unsigned WIDTH>
struct Panels {
    static constexpr unsigned BYTES = COUNT * WIDTH * sizeof(bf16);
    static constexpr unsigned ROW = 128, PANEL = COUNT * ROW;
    unsigned base;

    __device__ __forceinline__ unsigned at(unsigned row, unsigned vector) const {
        return base + vector / 8 * PANEL + row * ROW + (vector % 8 ^ row % 8) * 16;
    }
};

// Where an operand begins and how far apart its pieces are, in bytes; see "matrix descriptor" in the PTX manual.
__device__ __forceinline__ unsigned long long descriptor(unsigned address, unsigned leading, unsigned stride,
                                                         bool mixed) {
    return static_cast<unsigned long long>(mixed) << 62 | static_cast<unsigned long long>(stride / 16) << 32 |
           static_cast<unsigned long long>(leading / 16) << 16 | address / 16;
}

// 16 columns, from 16 `step`, of rows from `row`, as an operand whose columns are summed over.
template <unsigned COUNT, unsigned WIDTH>
__device__ __forceinline__ unsigned long long along_rows(Panels<COUNT, WIDTH> x, unsigned row, unsigned step) {
    using X = Panels<COUNT, WIDTH>;
    return descriptor(x.base + step / 4 * X::PANEL + row * X::ROW + step % 4 * 32, 16, 8 * X::ROW, true);
}

// 16 rows from `row`, all columns, as an operand whose rows are summed over.
template <unsigned COUNT, unsigned WIDTH>
__device__ __forceinline__ unsigned long long along_columns(Panels<COUNT, WIDTH> x, unsigned row) {
    using X = Panels<COUNT, WIDTH>;
    return descriptor(x.base + row * X::ROW, X::PANEL, 8 * X::ROW, true);
}

// Lets products see what this thread has copied to shared memory; all threads have to have done so.
__device__ __forceinline__ void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before products: their registers are ready.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Waits until all products of this warpgroup are done, and keeps the compiler from looking at `sum` before.
template <unsigned N>
__device__ __forceinline__ void await_products(float (&sum)[N][4]) {
    asm volatile("wgmma.commit_group.sync.aligned;\n\twgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (unsigned i = 0; i < N; i++) {
#pragma unroll
        for (unsigned c = 0; c < 4; c++) {
            asm volatile("" : "+f"(sum[i][c])::"memory");
        }
    }
}

#define SUM(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])

// sum += a b, 64 x 64. With ROWS the rows of b are summed over, else its columns.
template <bool ROWS>
__device__ __forceinline__ void products(float (&sum)[8][4], unsigned long long a, unsigned long long b) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, add, 1, 1, 0, %34;\n\t}"
        : SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
        : "l"(a), "l"(b), "n"(ROWS));
}

// The same with this warp's 16 rows of a in its registers, as for a warp's product.
template <bool ROWS>
__device__ __forceinline__ void products(float (&sum)[8][4], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, %37;\n\t}"
        : SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ROWS));
}

// sum += a b, 64 x 128. With ROWS the rows of b are summed over, else its columns.
template <bool ROWS>
__device__ __forceinline__ void products(float (&sum)[16][4], unsigned long long a, unsigned long long b) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, add, 1, 1, 0, %66;\n\t}"
        : SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7), SUM(8), SUM(9), SUM(10), SUM(11), SUM(12), SUM(13), SUM(14), SUM(15)
        : "l"(a), "l"(b), "n"(ROWS));
}

// The same with this warp's 16 rows of a in its registers, as for a warp's product.
template <bool ROWS>
__device__ __forceinline__ void products(float (&sum)[16][4], const unsigned (&a)[4], unsigned long long b) {
    asm volatile(
        "{\n\t.reg .pred add;\n\tsetp.eq.u32 add, 0, 0;\n\t"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, add, 1, 1, %69;\n\t}"
        : SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7), SUM(8), SUM(9), SUM(10), SUM(11), SUM(12), SUM(13), SUM(14), SUM(15)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ROWS));
}

#undef SUM
