// Between the matrix products of a token step: one row per sequence.
//
// `slots` tells where a row's state lies; a row whose slot is negative is padding and keeps its numbers to itself.
#include "relay.cuh"
#include "rms.cuh"

constexpr int MAX_VECTORS = 4;

// x = embedding of the token, and the sines and cosines of its position, computed in fp64 modulo 2 pi. gridDim.x rows.
extern "C" __global__ void __launch_bounds__(256)
    begin_rows(const bf16 *embedding, const int *ids, const int *positions, const double *frequencies, bf16 *x,
               float *cosines, float *sines, int width, int pairs) {
    admit_next();
    await_earlier();
    const int row = blockIdx.x;
    const bf16 *from = embedding + static_cast<size_t>(ids[row]) * width;
    bf16 *to = x + static_cast<size_t>(row) * width;
    for (int column = threadIdx.x * VECTOR; column < width; column += blockDim.x * VECTOR)
        store(to + column, load(from + column));
    constexpr double TURN = 6.283185307179586476925286766559;
    for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        const double angle = fmod(positions[row] * frequencies[pair], TURN);
        cosines[row * pairs + pair] = static_cast<float>(cos(angle));
        sines[row * pairs + pair] = static_cast<float>(sin(angle));
    }
}

// x += delta, if there is one, rounded; normed = round(x / rms(x)) * gain. gridDim.x rows.
extern "C" __global__ void __launch_bounds__(512)
    norm_rows(bf16 *x, const bf16 *delta, const bf16 *gain, bf16 *normed, int width, float eps) {
    admit_next();
    uint4 gains[MAX_VECTORS];
#pragma unroll
    for (int i = 0; i < MAX_VECTORS; ++i) {
        const int column = (i * blockDim.x + threadIdx.x) * VECTOR;
        if (column < width) gains[i] = load(gain + column);
    }
    await_earlier();
    const size_t row = static_cast<size_t>(blockIdx.x) * width;
    const bf16 *const added = delta == nullptr ? nullptr : delta + row;
    const auto fetched = [&](int i, int) { return gains[i]; };
    norm_row<MAX_VECTORS>(x + row, added, x + row, normed + row, width, eps, fetched);
}

// silu(gate) * up of the two halves of a row. gridDim = (blocks over the columns, rows).
extern "C" __global__ void __launch_bounds__(256) gate_rows(const bf16 *gate_up, bf16 *out, int width) {
    admit_next();
    await_earlier();
    const int column = (blockIdx.x * blockDim.x + threadIdx.x) * VECTOR;
    if (column >= width) return;
    const bf16 *row = gate_up + static_cast<size_t>(blockIdx.y) * 2 * width + column;
    float gate[VECTOR], up[VECTOR];
    unpack(load(row), gate);
    unpack(load(row + width), up);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) up[i] *= gate[i] * __fdividef(1.0f, 1.0f + __expf(-gate[i]));
    store(out + static_cast<size_t>(blockIdx.y) * width + column, pack(up));
}

// One token of one head of one sequence: bias, ReLU and rotary embedding of its query and key, U = S + k v^T, o = U^T q,
// S <- gamma U, and the norm of o. The state [D, D] goes through the registers once. gridDim = (heads, rows).
//
// D/4 lanes hold the columns of a row of the state, four each; the rows are dealt out to the rest of the block.
template <int D>
__device__ __forceinline__ void recur(const bf16 *projected, const bf16 *features_q, const bf16 *features_k,
                                      const bf16 *bias_q, const bf16 *bias_k, const float *cosines, const float *sines,
                                      const float *gammas, float *states, const int *slots, bf16 *out, int group,
                                      float key_scale) {
    constexpr int THREADS = 512, LANES = D / 4, ROWS = THREADS / LANES, PASSES = D / ROWS, HALF = D / 2;
    __shared__ float q[D], k[D], v[D], parts[THREADS / 32][D];
    admit_next();
    const int head = blockIdx.x, heads = gridDim.x, key_head = head / group, key_heads = heads / group;
    const int row = blockIdx.y, slot = slots[row];
    const int lane = threadIdx.x % LANES, first = threadIdx.x / LANES;
    if (slot < 0) {
        await_earlier();
        return;
    }
    float4 *state = reinterpret_cast<float4 *>(states + (static_cast<size_t>(slot) * heads + head) * D * D) +
                    first * LANES + lane;
    float4 s[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; ++i) s[i] = state[i * ROWS * LANES];
    const float gamma = gammas[head];
    const int i = threadIdx.x % HALF, part = threadIdx.x / HALF;
    const bf16 *bias = part == 0 ? bias_q + head * D : bias_k + key_head * D;
    const float biases[2] = {to_float(bias[i]), to_float(bias[i + HALF])};
    await_earlier();

    if (part < 2) {
        const bf16 *from = part == 0 ? features_q + (static_cast<size_t>(row) * heads + head) * D
                                     : features_k + (static_cast<size_t>(row) * key_heads + key_head) * D;
        const float a = fmaxf(to_float(from[i]) + biases[0], 0.0f);
        const float b = fmaxf(to_float(from[i + HALF]) + biases[1], 0.0f);
        const float c = cosines[row * HALF + i], d = sines[row * HALF + i], scale = part == 0 ? 1.0f : key_scale;
        float *to = part == 0 ? q : k;
        to[i] = round_to_bf16((a * c - b * d) * scale);
        to[i + HALF] = round_to_bf16((b * c + a * d) * scale);
    } else if (part < 4) {
        const int e = threadIdx.x - D;
        const size_t width = static_cast<size_t>(heads + 2 * key_heads) * D;
        v[e] = to_float(projected[row * width + (heads + key_heads + key_head) * D + e]);
    }
    __syncthreads();

    const float4 value = reinterpret_cast<const float4 *>(v)[lane];
    float o[4] = {};
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
        const float key = k[i * ROWS + first], query = q[i * ROWS + first];
        float4 u = s[i];
        u.x += key * value.x, u.y += key * value.y, u.z += key * value.z, u.w += key * value.w;
        o[0] += query * u.x, o[1] += query * u.y, o[2] += query * u.z, o[3] += query * u.w;
        u.x *= gamma, u.y *= gamma, u.z *= gamma, u.w *= gamma;
        state[i * ROWS * LANES] = u;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int distance = LANES; distance < 32; distance *= 2) o[j] += __shfl_xor_sync(ALL_LANES, o[j], distance);
    }
    if (threadIdx.x % 32 < LANES)
        reinterpret_cast<float4 *>(parts[threadIdx.x / 32])[lane] = make_float4(o[0], o[1], o[2], o[3]);
    __syncthreads();
    // One warp norms, so that nobody waits for anybody any more.
    if (threadIdx.x >= 32) return;
    constexpr int OWN = D / 32;
    float x[OWN] = {}, sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int warp = 0; warp < THREADS / 32; ++warp) {
#pragma unroll
        for (int j = 0; j < OWN; ++j) x[j] += parts[warp][threadIdx.x * OWN + j];
    }
#pragma unroll
    for (int j = 0; j < OWN; ++j) sum += x[j];
    const float mean = warp_sum(sum) / D;
#pragma unroll
    for (int j = 0; j < OWN; ++j) x[j] -= mean, squares += x[j] * x[j];
    const float scale = rsqrtf(warp_sum(squares) / D + 1e-5f);
    bf16 *const to = out + (static_cast<size_t>(row) * heads + head) * D + threadIdx.x * OWN;
#pragma unroll
    for (int j = 0; j < OWN; j += 2) *reinterpret_cast<unsigned *>(to + j) = pack(x[j] * scale, x[j + 1] * scale);
}

#define HEADS_OF(D)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(512, 2)                                                              \
        recur_##D(const bf16 *projected, const bf16 *features_q, const bf16 *features_k, const bf16 *bias_q,          \
                  const bf16 *bias_k, const float *cosines, const float *sines, const float *gammas, float *states,   \
                  const int *slots, bf16 *out, int group, float key_scale) {                                          \
        recur<D>(projected, features_q, features_k, bias_q, bias_k, cosines, sines, gammas, states, slots, out,       \
                 group, key_scale);                                                                                   \
    }

HEADS_OF(64)
HEADS_OF(128)

// The likeliest token of each row of logits, the smallest one of several; -1 where a logit is not a number.
extern "C" __global__ void __launch_bounds__(1024) choose_rows(const bf16 *logits, int *chosen, int vocabulary) {
    admit_next();
    await_earlier();
    const bf16 *row = logits + static_cast<size_t>(blockIdx.x) * vocabulary;
    float best = -infinity();
    int at = vocabulary;
    bool broken = false;
    for (int token = threadIdx.x; token < vocabulary; token += blockDim.x) {
        const float x = to_float(row[token]);
        broken |= x != x;
        if (x > best || at == vocabulary) best = x, at = token;
    }
    __shared__ float bests[32];
    __shared__ int places[32];
    broken = __syncthreads_or(broken);
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        const float x = __shfl_xor_sync(ALL_LANES, best, distance);
        const int other = __shfl_xor_sync(ALL_LANES, at, distance);
        if (x > best || (x == best && other < at)) best = x, at = other;
    }
    if (threadIdx.x % 32 == 0) bests[threadIdx.x / 32] = best, places[threadIdx.x / 32] = at;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < blockDim.x / 32; ++warp)
        if (bests[warp] > best || (bests[warp] == best && places[warp] < at)) best = bests[warp], at = places[warp];
    chosen[blockIdx.x] = broken ? -1 : at;
}
