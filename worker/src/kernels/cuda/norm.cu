// Residual and RMSNorm, and its gradient.
#include "rms.cuh"

// One block per row.
template <int VECTORS>
__device__ __forceinline__ void add_rms_norm(const bf16 *x, const bf16 *delta, const bf16 *gain, bf16 *sum, float *rstd,
                                             bf16 *normed, int width, float eps) {
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    const bf16 *const added = delta == nullptr ? nullptr : delta + row;
    const auto gains = [&](int, int column) { return load(gain + column); };
    const float scale = norm_row<VECTORS>(x + row, added, sum + row, normed + row, width, eps, gains);
    if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
}

// Blocks walk over the rows, and hold one in registers likewise. What a block saw of the gain's gradient goes to its own row
// of `dgain_parts` [gridDim.x, width].
template <int VECTORS>
__device__ __forceinline__ void rms_norm_backward(const bf16 *dnormed, const bf16 *x, const float *rstd, const bf16 *gain,
                                                  bf16 *dx_sum, float *dgain_parts, int rows, int width) {
    float dgain[VECTORS][VECTOR] = {};
    for (int n = blockIdx.x; n < rows; n += gridDim.x) {
        const size_t row = static_cast<size_t>(n) * width;
        const float scale = rstd[n];
        uint4 dy[VECTORS], normal[VECTORS], before[VECTORS];
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int column = (i * blockDim.x + threadIdx.x) * VECTOR;
            if (column >= width) continue;
            dy[i] = load(dnormed + row + column);
            normal[i] = load(x + row + column);
            before[i] = load(dx_sum + row + column);
        }
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int column = (i * blockDim.x + threadIdx.x) * VECTOR;
            if (column >= width) continue;
            float d[VECTOR], s[VECTOR], g[VECTOR];
            unpack(dy[i], d);
            unpack(normal[i], s);
            unpack(load(gain + column), g);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) {
                const float part = d[k] * (s[k] * scale);
                dgain[i][k] += part;
                dot += part * g[k];
            }
        }
        const float mean = block_sum(dot) / width;
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const int column = (i * blockDim.x + threadIdx.x) * VECTOR;
            if (column >= width) continue;
            float d[VECTOR], s[VECTOR], g[VECTOR], dx[VECTOR];
            unpack(dy[i], d);
            unpack(normal[i], s);
            unpack(load(gain + column), g);
            unpack(before[i], dx);
#pragma unroll
            for (int k = 0; k < VECTOR; ++k) dx[k] += scale * (d[k] * g[k] - s[k] * scale * mean);
            store(dx_sum + row + column, pack(dx));
        }
    }
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const int column = (i * blockDim.x + threadIdx.x) * VECTOR;
        if (column < width) store(dgain_parts + static_cast<size_t>(blockIdx.x) * width + column, dgain[i]);
    }
}

#define ROWS_OF(VECTORS)                                                                                              \
    extern "C" __global__ void __launch_bounds__(512) add_rms_norm_##VECTORS(                                         \
        const bf16 *x, const bf16 *delta, const bf16 *gain, bf16 *sum, float *rstd, bf16 *normed, int width,          \
        float eps) {                                                                                                  \
        add_rms_norm<VECTORS>(x, delta, gain, sum, rstd, normed, width, eps);                                         \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(512) rms_norm_backward_##VECTORS(                                    \
        const bf16 *dnormed, const bf16 *x, const float *rstd, const bf16 *gain, bf16 *dx_sum, float *dgain_parts,    \
        int rows, int width) {                                                                                        \
        rms_norm_backward<VECTORS>(dnormed, x, rstd, gain, dx_sum, dgain_parts, rows, width);                         \
    }

ROWS_OF(1)
ROWS_OF(2)
ROWS_OF(4)

// One block per row: `normed` again from what the forward pass kept.
extern "C" __global__ void __launch_bounds__(512) rms_norm_again(const bf16 *x, const float *rstd, const bf16 *gain,
                                                                 bf16 *normed, int width) {
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    const float scale = rstd[blockIdx.x];
    for (int column = threadIdx.x * VECTOR; column < width; column += blockDim.x * VECTOR) {
        float s[VECTOR], g[VECTOR];
        unpack(load(x + row + column), s);
        unpack(load(gain + column), g);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) s[k] = round_to_bf16(s[k] * scale) * g[k];
        store(normed + row + column, pack(s));
    }
}
