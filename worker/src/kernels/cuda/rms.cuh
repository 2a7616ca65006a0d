// Residual and RMSNorm of a row, which a block holds in registers: VECTORS vectors of eight in each thread, so that every number
// crosses memory once.
#pragma once

#include "common.cuh"

// The row s is x, or x + delta rounded, which then goes to `sum`; normed = round(s / rms(s)) * gain. `gains(i, column)` gives the
// gains of a thread's i-th vector. Returns 1 / rms(s).
template <int VECTORS, class Gains>
__device__ __forceinline__ float norm_row(const bf16 *x, const bf16 *delta, bf16 *sum, bf16 *normed, int width, float eps,
                                          Gains gains) {
    float s[VECTORS][VECTOR];
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int column = (i * blockDim.x + threadIdx.x) * VECTOR;
        if (column >= width) continue;
        unpack(load(x + column), s[i]);
        if (delta != nullptr) {
            float d[VECTOR];
            unpack(load(delta + column), d);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) s[i][k] += d[k];
            const uint4 rounded = pack(s[i]);
            store(sum + column, rounded);
            unpack(rounded, s[i]);
        }
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) squares += s[i][k] * s[i][k];
    }
    const float scale = rsqrtf(block_sum(squares) / width + eps);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int column = (i * blockDim.x + threadIdx.x) * VECTOR;
        if (column >= width) continue;
        float g[VECTOR];
        unpack(gains(i, column), g);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) s[i][k] = round_to_bf16(s[i][k] * scale) * g[k];
        store(normed + column, pack(s[i]));
    }
    return scale;
}
