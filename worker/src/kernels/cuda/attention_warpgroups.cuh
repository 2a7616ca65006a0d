// O, dQ, dK and dV of linear attention by products of warpgroups: for Hopper. Included by attention.cu.
#pragma once

#include "warpgroup.cuh"

template <unsigned D>
using Chunk = Panels<CHUNK, D>;

// How far tokens `row` and `row` + 8 of a chunk see: back to the first token of their segment, or, with LATER, on to the
// last one. Segments never decrease.
template <bool LATER>
__device__ __forceinline__ void find_reach(unsigned (&reach)[2], const long long *segments, unsigned row,
                                           unsigned rows) {
#pragma unroll
    for (unsigned half = 0; half < 2; half++) {
        const unsigned own = row + half * 8, most = LATER ? rows - 1 - own : own;
        if (own >= rows) {
            continue;
        }
        // At a distance of `low` the segment is its own, at one of more than `high` it is not.
        unsigned low = 0, high = most;
        while (low < high) {
            const unsigned middle = (low + high + 1) / 2, other = LATER ? own + middle : own - middle;
            if (segments[other] == segments[own]) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        reach[half] = low;
    }
}

// The products of 64 rows of X, from `first`, with 64 rows of Y, from `block`, weighted by how far they are apart, as left
// operands.
template <unsigned D, bool LATER>
__device__ __forceinline__ void weighted_scores(unsigned (&weighted)[4][4], Chunk<D> x, Chunk<D> y,
                                                const float *powers, const unsigned (&reach)[2], unsigned first,
                                                unsigned block) {
    const unsigned lane = threadIdx.x % WARP, t = lane % 4, row = first + threadIdx.x % 128 / WARP * 16 + lane / 4;
    float scores[8][4] = {};
    begin_products();
#pragma unroll
    for (unsigned k = 0; k < D / 16; k++) {
        products<false>(scores, along_rows(x, first, k), along_rows(y, block, k));
    }
    await_products(scores);
#pragma unroll
    for (unsigned n = 0; n < 8; n++) {
#pragma unroll
        for (unsigned c = 0; c < 4; c++) {
            const unsigned from = row + c / 2 * 8, other = block + n * 8 + 2 * t + c % 2;
            const unsigned age = LATER ? other - from : from - other;
            scores[n][c] = age <= reach[c / 2] ? scores[n][c] * powers[age] : 0.0f;
        }
    }
#pragma unroll
    for (unsigned i = 0; i < 4; i++) {
#pragma unroll
        for (unsigned r = 0; r < 4; r++) {
            const float (&pair)[4] = scores[2 * i + r / 2];
            weighted[i][r] = pack(pair[r % 2 * 2], pair[r % 2 * 2 + 1]);
        }
    }
}

// out += ((X Y^T) * M) Z for 64 rows X of a chunk, from `first`. Tokens see earlier ones, or, with LATER, later ones.
template <unsigned D, bool LATER>
__device__ __forceinline__ void attend(float (&out)[D / 8][4], Chunk<D> x, Chunk<D> y,
                                       Chunk<D> z, const float *powers, const unsigned (&reach)[2], unsigned first) {
#pragma unroll 1
    for (unsigned block = LATER ? first : 0; block < (LATER ? CHUNK : first + 64); block += 64) {
        unsigned weighted[4][4];
        weighted_scores<D, LATER>(weighted, x, y, powers, reach, first, block);
        begin_products();
#pragma unroll
        for (unsigned i = 0; i < 4; i++) {
            products<true>(out, weighted[i], along_columns(z, block + i * 16));
        }
        await_products(out);
    }
}

// sum += X S for 64 rows X, or X S^T, columns from `column` on as many as `sum` has.
template <unsigned D, bool TRANSPOSED, unsigned N>
__device__ __forceinline__ void multiply_state(float (&sum)[N][4], Chunk<D> x, State<D> state, unsigned first,
                                               unsigned column) {
    constexpr unsigned BLOCK = 128, BLOCKS = D / 8 * BLOCK;
    begin_products();
#pragma unroll
    for (unsigned k = 0; k < D / 16; k++) {
        if (TRANSPOSED) {
            const unsigned at = state.base + column / 8 * BLOCKS + 2 * k * BLOCK;
            products<false>(sum, along_rows(x, first, k), descriptor(at, BLOCK, BLOCKS, false));
        } else {
            const unsigned at = state.base + 2 * k * BLOCKS + column / 8 * BLOCK;
            products<true>(sum, along_rows(x, first, k), descriptor(at, BLOCKS, BLOCK, false));
        }
    }
    await_products(sum);
}

// O of (Q, K, V), or dQ of (dO, V, K), with the states S. Grid (B K, N) of 2 CHUNK threads; each warpgroup has 64 rows.
template <unsigned D, bool GRADIENT, bool ENTERED>
__device__ __forceinline__ void outputs(const bf16 *x_bhtd, const bf16 *y_bktd, const bf16 *z_bktd,
                                        const bf16 *states_bhndd, const float *log2_gamma_h,
                                        const long long *segments_bt, bf16 *out_bhtd, unsigned tokens, unsigned heads,
                                        unsigned kv_heads) {
    using Tile = Chunk<D>;
    extern __shared__ __align__(1024) unsigned char aligned[];
    const unsigned tiles = shared_address(aligned);
    const Tile y_rows{tiles}, z_rows{tiles + Tile::BYTES};
    const auto x_of = [&](unsigned member) { return Tile{tiles + (2 + member % 2) * Tile::BYTES}; };
    const auto state_of = [&](unsigned member) {
        return State<D>{tiles + 4 * Tile::BYTES + member % 2 * State<D>::BYTES};
    };
    __shared__ long long segments[CHUNK];
    __shared__ float powers_of[2][CHUNK];

    const unsigned kv_head = blockIdx.x, chunk = blockIdx.y;
    const unsigned group = heads / kv_heads, chunks = pieces_of(tokens, CHUNK);
    const unsigned token = chunk * CHUNK, rows = min(CHUNK, tokens - token);
    const bool entered = ENTERED || chunk != 0;
    const unsigned first = threadIdx.x / 128 * 64, row = first + threadIdx.x % 128 / WARP * 16;
    const unsigned g = threadIdx.x % WARP / 4;

    const auto begin = [&](unsigned member) {
        if (member < group) {
            const unsigned head = kv_head * group + member;
            copy_rows(x_of(member), x_bhtd + channels<D>(head, tokens, token), rows, D);
            if (entered) {
                copy_state(state_of(member), states_bhndd + state_at<D, ENTERED>(head, chunks, chunk));
            }
        }
        end_copies();
    };

    const bool documents = !ENTERED && segments_bt != nullptr;
    long long running = 0;
    if (documents) {
        const long long *const own = segments_bt + size_t(kv_head / kv_heads) * tokens + token;
        running = chunk == 0 ? 0 : own[-1];
        copy_segments<CHUNK>(segments, own, rows);
    }
    // An empty group stands behind every head's in the place of Y and Z.
    begin(0);
    const size_t kv_row = channels<D>(kv_head, tokens, token);
    copy_rows(y_rows, y_bktd + kv_row, rows, D);
    copy_rows(z_rows, z_bktd + kv_row, rows, D);
    end_copies();

    unsigned reach[2] = {CHUNK - 1, CHUNK - 1};
    // What a head needs is fetched while another one is computed; Y and Z while the first meets its state.
    for (unsigned member = 0; member < group; member++) {
        const unsigned head = kv_head * group + member;
        float *const powers = powers_of[member % 2];
        if (threadIdx.x < CHUNK) {
            powers[threadIdx.x] = exp2f(log2_gamma_h[head % heads] * threadIdx.x);
        }
        await_copies<1>();
        show_copies();
        __syncthreads();
        begin(member + 1);
        if (documents && member == 0) {
            find_reach<false>(reach, segments, row + g, rows);
        }

        float out[D / 8][4] = {};
        if (entered) {
            multiply_state<D, GRADIENT>(out, x_of(member), state_of(member), first, 0);
#pragma unroll
            for (unsigned half = 0; half < 2; half++) {
                const unsigned own = row + g + half * 8;
                const float scale = !documents || segments[own] == running ? powers[own] : 0.0f;
#pragma unroll
                for (unsigned n = 0; n < D / 8; n++) {
                    out[n][2 * half] *= scale;
                    out[n][2 * half + 1] *= scale;
                }
            }
        }
        if (member == 0) {
            await_copies<1>();
            show_copies();
            __syncthreads();
        }
        attend<D, false>(out, x_of(member), y_rows, z_rows, powers, reach, first);
        end_copies();
        store_rows<D>(out_bhtd + channels<D>(head, tokens, token), out, row, rows);
    }
}

// dK and dV, with the states G. Grid (B K, N) of 4 CHUNK threads; in the first half, each warpgroup has 64 rows of dK, in
// the other of dV.
template <unsigned D>
__device__ __forceinline__ void key_value_gradients(const bf16 *q_bhtd, const bf16 *k_bktd, const bf16 *v_bktd,
                                                    const bf16 *do_bhtd, const bf16 *states_bhndd,
                                                    const float *log2_gamma_h, const long long *segments_bt,
                                                    bf16 *dk_bktd, bf16 *dv_bktd, unsigned tokens, unsigned heads,
                                                    unsigned kv_heads) {
    constexpr unsigned POWERS = CHUNK + 1;
    using Tile = Chunk<D>;
    extern __shared__ __align__(1024) unsigned char aligned[];
    const unsigned tiles = shared_address(aligned);
    const Tile q_rows{tiles}, do_rows{tiles + Tile::BYTES}, k_rows{tiles + 2 * Tile::BYTES},
        v_rows{tiles + 3 * Tile::BYTES};
    const State<D> state{tiles + 4 * Tile::BYTES};
    __shared__ long long segments[CHUNK];
    __shared__ float powers[POWERS];

    const unsigned kv_head = blockIdx.x, chunk = blockIdx.y;
    const unsigned group = heads / kv_heads, chunks = pieces_of(tokens, CHUNK);
    const unsigned token = chunk * CHUNK, rows = min(CHUNK, tokens - token);
    const bool last = chunk + 1 == chunks, keys = threadIdx.x < 2 * CHUNK;
    const unsigned first = threadIdx.x / 128 % 2 * 64, row = first + threadIdx.x % 128 / WARP * 16;
    const unsigned g = threadIdx.x % WARP / 4;

    const auto begin_rows = [&](unsigned head) {
        const size_t from = channels<D>(head, tokens, token);
        copy_rows(q_rows, q_bhtd + from, rows, D);
        copy_rows(do_rows, do_bhtd + from, rows, D);
    };
    const auto begin_state = [&](unsigned head) {
        copy_state(state, states_bhndd + state_at<D, false>(head, chunks, chunk + 1));
    };

    const bool documents = segments_bt != nullptr;
    if (documents) {
        copy_segments<CHUNK>(segments, segments_bt + size_t(kv_head / kv_heads) * tokens + token, rows);
    }
    const size_t kv_row = channels<D>(kv_head, tokens, token);
    copy_rows(k_rows, k_bktd + kv_row, rows, D);
    copy_rows(v_rows, v_bktd + kv_row, rows, D);
    begin_rows(kv_head * group);
    end_copies();
    if (!last) {
        begin_state(kv_head * group);
    }
    end_copies();

    const Tile own_rows = keys ? v_rows : k_rows;
    unsigned reach[2] = {CHUNK - 1, CHUNK - 1};
    float out[D / 8][4] = {};
    for (unsigned member = 0; member < group; member++) {
        const unsigned head = kv_head * group + member;
        if (threadIdx.x < POWERS) {
            powers[threadIdx.x] = exp2f(log2_gamma_h[head % heads] * threadIdx.x);
        }
        await_copies<1>();
        show_copies();
        __syncthreads();
        if (documents && member == 0) {
            find_reach<true>(reach, segments, row + g, rows);
        }
        attend<D, true>(out, own_rows, keys ? do_rows : q_rows, keys ? q_rows : do_rows, powers, reach, first);
        __syncthreads();
        if (member + 1 < group) {
            begin_rows(head + 1);
        }
        end_copies();

        await_copies<1>();
        show_copies();
        __syncthreads();
        if (!last) {
#pragma unroll
            for (unsigned column = 0; column < D; column += 64) {
                float part[8][4] = {};
                if (keys) {
                    multiply_state<D, true>(part, own_rows, state, first, column);
                } else {
                    multiply_state<D, false>(part, own_rows, state, first, column);
                }
#pragma unroll
                for (unsigned half = 0; half < 2; half++) {
                    const unsigned own = row + g + half * 8;
                    const bool reaches = !documents || segments[own] == segments[CHUNK - 1];
                    const float scale = reaches ? powers[CHUNK - own] : 0.0f;
#pragma unroll
                    for (unsigned n = 0; n < 8; n++) {
                        out[column / 8 + n][2 * half] += scale * part[n][2 * half];
                        out[column / 8 + n][2 * half + 1] += scale * part[n][2 * half + 1];
                    }
                }
            }
            __syncthreads();
            if (member + 1 < group) {
                begin_state(head + 1);
            }
        }
        end_copies();
    }
    store_rows<D>((keys ? dk_bktd : dv_bktd) + kv_row, out, row, rows);
}
