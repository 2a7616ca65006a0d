// The embedding's gradient: rows of the same token are added in the order of their positions.
//
// gridDim = (n, slices of the D columns). The block of a token's first position adds all rows of that token; the others
// find an earlier one and leave. So each row of the gradient has one writer and one order.
#include "common.cuh"

extern "C" __global__ void __launch_bounds__(512)
    embedding_backward(const bf16 *dx, const long long *ids, float *dembedding_sum, int rows, int width, int vocabulary) {
    const int self = blockIdx.x;
    const long long id = ids[self];
    if (id < 0 || id >= vocabulary) return;
    // From the nearest position back: what is frequent is found soon.
    for (int end = self; end > 0; end -= blockDim.x) {
        const int earlier = end - 1 - static_cast<int>(threadIdx.x);
        if (__syncthreads_or(earlier >= 0 && ids[earlier] == id)) return;
    }

    __shared__ int matches[512];
    __shared__ int before[16];  // matches of the warps before each warp
    __shared__ int found;
    const int column = (blockIdx.y * blockDim.x + threadIdx.x) * VECTOR;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    float sum[VECTOR] = {};
    for (int begin = self; begin < rows; begin += blockDim.x) {
        const int n = begin + threadIdx.x;
        const bool match = n < rows && ids[n] == id;
        const unsigned votes = __ballot_sync(ALL_LANES, match);
        if (lane == 0) before[warp] = __popc(votes);
        __syncthreads();
        if (threadIdx.x == 0) {
            int total = 0;
            for (int w = 0; w < warps; ++w) {
                const int own = before[w];
                before[w] = total;
                total += own;
            }
            found = total;
        }
        __syncthreads();
        if (match) matches[before[warp] + __popc(votes & ((1u << lane) - 1))] = n;
        __syncthreads();
        if (column < width) {
#pragma unroll 4
            for (int i = 0; i < found; ++i) {
                float d[VECTOR];
                unpack(load(dx + static_cast<size_t>(matches[i]) * width + column), d);
#pragma unroll
                for (int k = 0; k < VECTOR; ++k) sum[k] += d[k];
            }
        }
        __syncthreads();
    }
    if (column < width) {
        float *at = dembedding_sum + static_cast<size_t>(id) * width + column;
        float total[VECTOR];
        load(at, total);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) total[k] += sum[k];
        store(at, total);
    }
}
