// The norm of each head of each token, from [B, H, T, d] to [n, H d], and its gradient.
//
// `lanes` threads, a power of two, hold one head of one token, eight channels each; lanes beyond d/8 hold nothing. The mean
// is taken off before squares are summed, as cancellation would cost what bf16 has.
#include "common.cuh"

struct Head {
    bool there;      // whether this lane holds channels
    size_t first;    // of the lane's channels in [B, H, T, d]
    size_t token;    // of the lane's channels in [n, H d]
};

// Heads are taken token by token, so that [n, H d] is read or written front to back.
__device__ __forceinline__ Head find_head(int rows, int tokens, int heads, int width, int lanes) {
    const unsigned index = (blockIdx.x * blockDim.x + threadIdx.x) / lanes;
    const int channel = threadIdx.x % lanes * VECTOR;
    const unsigned n = index / heads, h = index - n * heads, row = n / tokens, t = n - row * tokens;
    Head head;
    head.there = n < rows && channel < width;
    head.first = ((static_cast<size_t>(row) * heads + h) * tokens + t) * width + channel;
    head.token = static_cast<size_t>(index) * width + channel;
    return head;
}

__device__ __forceinline__ float lane_sum(float x, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

__device__ __forceinline__ float sum(const float (&x)[VECTOR]) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// Leaves x - mean in x and returns 1 / sqrt(variance + eps).
__device__ __forceinline__ float center(float (&x)[VECTOR], bool there, int width, int lanes, float eps) {
    const float mean = lane_sum(sum(x), lanes) / width;
    float squares = 0.0f;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        x[i] = there ? x[i] - mean : 0.0f;
        squares += x[i] * x[i];
    }
    return rsqrtf(lane_sum(squares, lanes) / width + eps);
}

extern "C" __global__ void __launch_bounds__(256)
    head_norm(const bf16 *o, bf16 *out, int rows, int tokens, int heads, int width, int lanes, float eps) {
    const Head head = find_head(rows, tokens, heads, width, lanes);
    float x[VECTOR] = {};
    if (head.there) unpack(load(o + head.first), x);
    const float scale = center(x, head.there, width, lanes, eps);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[i] *= scale;
    if (head.there) store(out + head.token, pack(x));
}

extern "C" __global__ void __launch_bounds__(256)
    head_norm_backward(const bf16 *dout, const bf16 *o, bf16 *dx, int rows, int tokens, int heads, int width, int lanes,
                       float eps) {
    const Head head = find_head(rows, tokens, heads, width, lanes);
    float x[VECTOR] = {}, d[VECTOR] = {}, dot[VECTOR];
    if (head.there) {
        unpack(load(o + head.first), x);
        unpack(load(dout + head.token), d);
    }
    const float scale = center(x, head.there, width, lanes, eps);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
        x[i] *= scale;
        dot[i] = d[i] * x[i];
    }
    const float mean = lane_sum(sum(d), lanes) / width, slope = lane_sum(sum(dot), lanes) / width;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) d[i] = scale * (d[i] - mean - x[i] * slope);
    if (head.there) store(dx + head.first, pack(d));
}
