// From projections to heads, and back: bias, ReLU, rotary embedding, scale of the keys, and each head's tokens together.
//
// A thread owns one head and eight pairs of its channels (i, i + d/2), and walks over the tokens; so what it adds to the
// biases' gradients stays in its registers. blockDim = (d/16, heads of a block), gridDim = (slices of the tokens, groups of
// heads). Heads are numbered through: H of the queries, then K of the keys, then K of the values.
#include "common.cuh"

// One of the three tensors, and this thread's place in its rows.
struct Place {
    int which;    // 0: queries, 1: keys, 2: values
    int head;     // within that tensor
    int heads;    // of that tensor
    int channel;  // of the first half of the pairs, within a token's row
};

__device__ __forceinline__ Place place(int all, int query_heads, int key_heads, int width) {
    Place p;
    p.which = all < query_heads ? 0 : all < query_heads + key_heads ? 1 : 2;
    p.head = p.which == 0 ? all : p.which == 1 ? all - query_heads : all - query_heads - key_heads;
    p.heads = p.which == 0 ? query_heads : key_heads;
    p.channel = p.head * width + threadIdx.x * VECTOR;
    return p;
}

template <typename Pointer>
__device__ __forceinline__ Pointer choose(int which, Pointer q, Pointer k, Pointer v) {
    return which == 0 ? q : which == 1 ? k : v;
}

// Where a token's part of the head begins in [B, heads, T, d].
__device__ __forceinline__ size_t heads_first(const Place &p, int token, int tokens, int width) {
    const int row = token / tokens, t = token - row * tokens;
    return ((static_cast<size_t>(row) * p.heads + p.head) * tokens + t) * width + threadIdx.x * VECTOR;
}

// Where a token's angles begin in the tables [1 or B, T, d/2]; `table_rows` is 1 or B.
__device__ __forceinline__ size_t angles(int token, int tokens, int table_rows, int half) {
    const int line = table_rows == 1 ? token % tokens : token;
    return static_cast<size_t>(line) * half + threadIdx.x * VECTOR;
}

extern "C" __global__ void __launch_bounds__(512)
    heads(const bf16 *pre_q, const bf16 *pre_k, const bf16 *v_in, const bf16 *bias_q, const bf16 *bias_k,
          const float *cosines, const float *sines, bf16 *q, bf16 *k, bf16 *v_out, long long stride_q, long long stride_k,
          long long stride_v, int rows, int tokens, int query_heads, int key_heads, int width, int table_rows,
          float key_scale) {
    const int all = blockIdx.y * blockDim.y + threadIdx.y;
    if (all >= query_heads + 2 * key_heads) return;
    const Place p = place(all, query_heads, key_heads, width);
    const bf16 *from = choose(p.which, pre_q, pre_k, v_in) + p.channel;
    bf16 *to = choose(p.which, q, k, v_out);
    const long long stride = choose(p.which, stride_q, stride_k, stride_v);
    const int half = width / 2;

    if (p.which == 2) {
        for (int token = blockIdx.x; token < rows; token += gridDim.x) {
            const bf16 *in = from + token * stride;
            bf16 *out = to + heads_first(p, token, tokens, width);
            const uint4 first = load(in), second = load(in + half);
            store(out, first);
            store(out + half, second);
        }
        return;
    }

    const bf16 *bias = p.which == 0 ? bias_q : bias_k;
    const float scale = p.which == 0 ? 1.0f : key_scale;
    float first_bias[VECTOR] = {}, second_bias[VECTOR] = {};
    if (bias != nullptr) {
        unpack(load(bias + p.channel), first_bias);
        unpack(load(bias + p.channel + half), second_bias);
    }
    for (int token = blockIdx.x; token < rows; token += gridDim.x) {
        const bf16 *in = from + token * stride;
        const size_t angle = angles(token, tokens, table_rows, half);
        float first[VECTOR], second[VECTOR], cosine[VECTOR], sine[VECTOR];
        unpack(load(in), first);
        unpack(load(in + half), second);
        load(cosines + angle, cosine);
        load(sines + angle, sine);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            if (bias != nullptr) {
                first[i] = fmaxf(first[i] + first_bias[i], 0.0f);
                second[i] = fmaxf(second[i] + second_bias[i], 0.0f);
            }
            const float turned = (first[i] * cosine[i] - second[i] * sine[i]) * scale;
            second[i] = (second[i] * cosine[i] + first[i] * sine[i]) * scale;
            first[i] = turned;
        }
        bf16 *out = to + heads_first(p, token, tokens, width);
        store(out, pack(first));
        store(out + half, pack(second));
    }
}

// Each slice of the tokens leaves its part of the biases' gradients in its own row of `dbias_parts`
// [gridDim.x, (H + K) d].
extern "C" __global__ void __launch_bounds__(512)
    heads_backward(const bf16 *dq, const bf16 *dk, const bf16 *dv_in, const bf16 *pre_q, const bf16 *pre_k,
                   const bf16 *bias_q, const bf16 *bias_k, const float *cosines, const float *sines, bf16 *dpre_q,
                   bf16 *dpre_k, bf16 *dv_out, float *dbias_parts, long long stride_q, long long stride_k,
                   long long dstride_q, long long dstride_k, long long dstride_v, int rows, int tokens, int query_heads,
                   int key_heads, int width, int table_rows, float key_scale) {
    const int all = blockIdx.y * blockDim.y + threadIdx.y;
    if (all >= query_heads + 2 * key_heads) return;
    const Place p = place(all, query_heads, key_heads, width);
    const bf16 *from = choose(p.which, dq, dk, dv_in);
    bf16 *to = choose(p.which, dpre_q, dpre_k, dv_out) + p.channel;
    const long long stride = choose(p.which, dstride_q, dstride_k, dstride_v);
    const int half = width / 2;

    if (p.which == 2) {
        for (int token = blockIdx.x; token < rows; token += gridDim.x) {
            const bf16 *in = from + heads_first(p, token, tokens, width);
            bf16 *out = to + token * stride;
            const uint4 first = load(in), second = load(in + half);
            store(out, first);
            store(out + half, second);
        }
        return;
    }

    const bf16 *before = choose(p.which, pre_q, pre_k, pre_k) + p.channel;
    const long long before_stride = choose(p.which, stride_q, stride_k, stride_k);
    const bf16 *bias = p.which == 0 ? bias_q : bias_k;
    const float scale = p.which == 0 ? 1.0f : key_scale;
    float first_dbias[VECTOR] = {}, second_dbias[VECTOR] = {};
    for (int token = blockIdx.x; token < rows; token += gridDim.x) {
        const bf16 *in = from + heads_first(p, token, tokens, width);
        const size_t angle = angles(token, tokens, table_rows, half);
        float first[VECTOR], second[VECTOR], cosine[VECTOR], sine[VECTOR];
        unpack(load(in), first);
        unpack(load(in + half), second);
        load(cosines + angle, cosine);
        load(sines + angle, sine);
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            const float turned = (first[i] * cosine[i] + second[i] * sine[i]) * scale;
            second[i] = (second[i] * cosine[i] - first[i] * sine[i]) * scale;
            first[i] = turned;
        }
        if (bias != nullptr) {
            const bf16 *pre = before + token * before_stride;
            float first_pre[VECTOR], second_pre[VECTOR], b[VECTOR];
            unpack(load(pre), first_pre);
            unpack(load(pre + half), second_pre);
            unpack(load(bias + p.channel), b);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                first[i] = first_pre[i] + b[i] > 0.0f ? first[i] : 0.0f;
                first_dbias[i] += first[i];
            }
            unpack(load(bias + p.channel + half), b);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) {
                second[i] = second_pre[i] + b[i] > 0.0f ? second[i] : 0.0f;
                second_dbias[i] += second[i];
            }
        }
        bf16 *out = to + token * stride;
        store(out, pack(first));
        store(out + half, pack(second));
    }
    if (bias != nullptr) {
        const int begin = p.which == 0 ? 0 : query_heads * width;
        float *parts =
            dbias_parts + static_cast<size_t>(blockIdx.x) * (query_heads + key_heads) * width + begin + p.channel;
        store(parts, first_dbias);
        store(parts + half, second_dbias);
    }
}
