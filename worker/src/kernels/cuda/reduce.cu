// The second stage of sums that many blocks began: always the same order, so always the same bits.
#include "common.cuh"

// Adds the sum over the rows of `parts` (`stride` numbers apart) to `sum`, column by column. Blocks of 32 x 32 threads,
// each for 32 columns.
extern "C" __global__ void __launch_bounds__(1024) column_sum(const float *parts, float *sum, int rows, int width,
                                                              int stride) {
    __shared__ float slices[32][32];
    const int column = blockIdx.x * 32 + threadIdx.x;
    float slice = 0.0f;
    if (column < width) {
        for (int row = threadIdx.y; row < rows; row += 32) slice += parts[static_cast<size_t>(row) * stride + column];
    }
    slices[threadIdx.y][threadIdx.x] = slice;
    __syncthreads();
    if (threadIdx.y == 0 && column < width) {
        float total = 0.0f;
        for (int i = 0; i < 32; ++i) total += slices[i][threadIdx.x];
        sum[column] += total;
    }
}

// Adds the sum of `count` pairs to one pair. One block.
extern "C" __global__ void __launch_bounds__(1024) pair_sum(const double2 *parts, double2 *sum, int count) {
    double first = 0.0, second = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        first += parts[i].x;
        second += parts[i].y;
    }
    first = block_sum(first);
    second = block_sum(second);
    if (threadIdx.x == 0) *sum = make_double2(sum->x + first, sum->y + second);
}

// Replaces `mine`, the numbers of rank `rank`, by the sum over all ranks, added in their order. `theirs` are the numbers of
// the others, [world - 1, count], in that order, too.
extern "C" __global__ void __launch_bounds__(256) rank_sum(float *mine, const float *theirs, long long count, int rank,
                                                           int world) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        const float own = mine[i];
        float sum = rank == 0 ? own : theirs[i];
        for (int other = 1; other < world; ++other) {
            // Behind this rank the others' rows are one place further up.
            const int row = other < rank ? other : other - 1;
            sum = __fadd_rn(sum, other == rank ? own : theirs[row * count + i]);
        }
        mine[i] = sum;
    }
}
