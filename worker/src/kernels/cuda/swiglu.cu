// silu(gate) * up, and its gradient in place of [gate | up].
//
// gridDim.x blocks lie side by side over a row's F columns; blocks of y walk over the rows.
#include "common.cuh"

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

extern "C" __global__ void __launch_bounds__(256) swiglu(const bf16 *gate_up, bf16 *out, int rows, int width) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (column >= width) return;
    for (int n = blockIdx.y; n < rows; n += gridDim.y) {
        const bf16 *row = gate_up + static_cast<size_t>(n) * 2 * width + column;
        float gate[VECTOR], up[VECTOR];
        unpack(load(row), gate);
        unpack(load(row + width), up);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) up[i] *= gate[i] * sigmoid(gate[i]);
        store(out + static_cast<size_t>(n) * width + column, pack(up));
    }
}

extern "C" __global__ void __launch_bounds__(256) swiglu_backward(bf16 *gate_up, const bf16 *dout, int rows, int width) {
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (column >= width) return;
    for (int n = blockIdx.y; n < rows; n += gridDim.y) {
        bf16 *row = gate_up + static_cast<size_t>(n) * 2 * width + column;
        float gate[VECTOR], up[VECTOR], d[VECTOR];
        unpack(load(row), gate);
        unpack(load(row + width), up);
        unpack(load(dout + static_cast<size_t>(n) * width + column), d);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float s = sigmoid(gate[i]), silu = gate[i] * s;
            gate[i] = d[i] * up[i] * (s + silu * (1.0f - s));
            up[i] = d[i] * silu;
        }
        store(row, pack(gate));
        store(row + width, pack(up));
    }
}
