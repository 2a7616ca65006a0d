// Softmax attention of a token step: one new token per sequence, which sees all earlier ones in a cache of its own.
//
// The tokens of a sequence are divided among `splits` blocks, each of which serves the query heads of one key/value head and
// leaves what it has seen in `parts`; a second kernel puts the parts together. Keys and values of a slot's sequence lie in
// buffers [K, room, D] whose addresses and rooms are in tables, since they grow.
#include "relay.cuh"

constexpr int THREADS = 128;

// What one block has seen for one query head: the largest score, the sum of exp(score - largest), and the values weighted so.
template <int D>
struct Part {
    float largest, sum, values[D];
};

// The rotated pair (i, i + D/2) of a head, rounded.
template <int D>
__device__ __forceinline__ void rotate(const bf16 *from, const float *cosines, const float *sines, int i, float *to) {
    constexpr int HALF = D / 2;
    const float a = to_float(from[i]), b = to_float(from[i + HALF]), c = cosines[i], s = sines[i];
    to[i] = round_to_bf16(a * c - b * s);
    to[i + HALF] = round_to_bf16(b * c + a * s);
}

// gridDim = (K splits, rows). D/8 lanes have eight channels each of a token; GROUP query heads look at it at once.
template <int D, int GROUP>
__device__ __forceinline__ void attend(const bf16 *projected, const float *cosines, const float *sines,
                                       bf16 *const *keys, bf16 *const *values, const int *rooms, const int *slots,
                                       const int *positions, Part<D> *parts, int key_heads, float scale) {
    constexpr int LANES = D / VECTOR, TEAMS = THREADS / LANES, TOKENS = 4;
    __shared__ float q[GROUP][D], k[D], v[D];
    __shared__ float largests[TEAMS][GROUP], sums[TEAMS][GROUP], seen[TEAMS][GROUP][D];
    admit_next();
    const int splits = gridDim.x / key_heads, key_head = blockIdx.x / splits, split = blockIdx.x % splits;
    const int row = blockIdx.y, slot = slots[row], heads = key_heads * GROUP;
    await_earlier();
    if (slot < 0) return;
    const int position = positions[row], share = (position + splits) / splits;
    const int begin = split * share, end = min(begin + share, position + 1);
    Part<D> *part = parts + (static_cast<size_t>(row) * heads + key_head * GROUP) * splits + split;
    if (begin >= end) {
        if (threadIdx.x < GROUP) {
            part[threadIdx.x * splits].largest = -infinity();
            part[threadIdx.x * splits].sum = 0.0f;
        }
        return;
    }
    const bf16 *in = projected + static_cast<size_t>(row) * (heads + 2 * key_heads) * D;
    const float *c = cosines + row * (D / 2), *s = sines + row * (D / 2);
    for (int i = threadIdx.x; i < GROUP * D / 2; i += THREADS)
        rotate<D>(in + (key_head * GROUP + i / (D / 2)) * D, c, s, i % (D / 2), q[i / (D / 2)]);
    const size_t base = static_cast<size_t>(key_head) * rooms[slot] * D;
    bf16 *key_rows = keys[slot] + base, *value_rows = values[slot] + base;
    const bool last = end == position + 1;
    if (last) {
        for (int i = threadIdx.x; i < D / 2; i += THREADS) rotate<D>(in + (heads + key_head) * D, c, s, i, k);
        for (int i = threadIdx.x; i < D; i += THREADS) v[i] = to_float(in[(heads + key_heads + key_head) * D + i]);
    }
    __syncthreads();
    if (last) {
        for (int i = threadIdx.x; i < D; i += THREADS) {
            key_rows[static_cast<size_t>(position) * D + i] = to_bf16(k[i]);
            value_rows[static_cast<size_t>(position) * D + i] = to_bf16(v[i]);
        }
    }

    const int team = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    // Teams of a warp may have different numbers of tokens.
    const unsigned mates = ((1u << LANES) - 1u) << (threadIdx.x % 32 / LANES * LANES);
    float query[GROUP][VECTOR], o[GROUP][VECTOR] = {}, largest[GROUP], sum[GROUP] = {};
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        largest[g] = -infinity();
        load(q[g] + lane * VECTOR, query[g]);
    }
    for (int first = begin + team * TOKENS; first < end; first += TEAMS * TOKENS) {
        uint4 packed_k[TOKENS], packed_v[TOKENS];
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (first + t >= position || first + t >= end) continue;
            const size_t at = static_cast<size_t>(first + t) * D + lane * VECTOR;
            packed_k[t] = load(key_rows + at);
            packed_v[t] = load(value_rows + at);
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (first + t >= end) continue;
            float key[VECTOR], value[VECTOR];
            if (first + t == position) {
                load(k + lane * VECTOR, key);
                load(v + lane * VECTOR, value);
            } else {
                unpack(packed_k[t], key);
                unpack(packed_v[t], value);
            }
#pragma unroll
            for (int g = 0; g < GROUP; ++g) {
                float score = 0.0f;
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) score += query[g][i] * key[i];
#pragma unroll
                for (int distance = LANES / 2; distance > 0; distance /= 2)
                    score += __shfl_xor_sync(mates, score, distance);
                score *= scale;
                const float top = fmaxf(largest[g], score);
                const float keep = __expf(largest[g] - top), weight = __expf(score - top);
                largest[g] = top;
                sum[g] = sum[g] * keep + weight;
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) o[g][i] = o[g][i] * keep + weight * value[i];
            }
        }
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
        if (lane == 0) largests[team][g] = largest[g], sums[team][g] = sum[g];
        store(seen[team][g] + lane * VECTOR, o[g]);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < GROUP * D; i += THREADS) {
        const int g = i / D, e = i % D;
        float top = -infinity(), all = 0.0f, total = 0.0f;
        for (int team = 0; team < TEAMS; ++team) top = fmaxf(top, largests[team][g]);
        for (int team = 0; team < TEAMS; ++team) {
            const float weight = __expf(largests[team][g] - top);
            all += sums[team][g] * weight;
            total += seen[team][g][e] * weight;
        }
        Part<D> &to = part[g * splits];
        to.values[e] = total;
        if (e == 0) to.largest = top, to.sum = all;
    }
}

// gridDim = (heads, rows), blockDim = D.
template <int D>
__device__ __forceinline__ void unite(const Part<D> *parts, const int *slots, bf16 *out, int splits) {
    admit_next();
    await_earlier();
    const int head = blockIdx.x, heads = gridDim.x, row = blockIdx.y;
    if (slots[row] < 0) return;
    const Part<D> *part = parts + (static_cast<size_t>(row) * heads + head) * splits;
    float top = -infinity(), all = 0.0f, total = 0.0f;
    for (int split = 0; split < splits; ++split) top = fmaxf(top, part[split].largest);
    for (int split = 0; split < splits; ++split) {
        if (part[split].sum == 0.0f) continue;
        const float weight = __expf(part[split].largest - top);
        all += part[split].sum * weight;
        total += part[split].values[threadIdx.x] * weight;
    }
    out[(static_cast<size_t>(row) * heads + head) * D + threadIdx.x] = to_bf16(total / all);
}

#define GROUP_OF(D, GROUP)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                             \
        attend_##D##_##GROUP(const bf16 *projected, const float *cosines, const float *sines, bf16 *const *keys,      \
                             bf16 *const *values, const int *rooms, const int *slots, const int *positions,           \
                             Part<D> *parts, int key_heads, float scale) {                                            \
        attend<D, GROUP>(projected, cosines, sines, keys, values, rooms, slots, positions, parts, key_heads, scale);  \
    }

#define HEADS_OF(D)                                                                                                   \
    GROUP_OF(D, 1)                                                                                                    \
    GROUP_OF(D, 2)                                                                                                    \
    GROUP_OF(D, 4)                                                                                                    \
    GROUP_OF(D, 8)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(D)                                                                   \
        unite_##D(const Part<D> *parts, const int *slots, bf16 *out, int splits) {                                    \
        unite<D>(parts, slots, out, splits);                                                                          \
    }

HEADS_OF(64)
HEADS_OF(128)
