// O, dQ, dK and dV of linear attention by products of single warps: for GPUs whose warpgroups have none together. Included by
// attention.cu.
#pragma once

template <unsigned D>
using Chunk = Rows<CHUNK, D>;

// The 16 x 16 at (row, column) as left operand of a product.
template <class Tile>
__device__ __forceinline__ void load_left(unsigned (&a)[4], Tile tile, unsigned row, unsigned column) {
    const unsigned lane = threadIdx.x % WARP;
    load_matrices(a, tile.at(row + lane % 16, column / VECTOR, lane / 16));
}

// The 32 x 8 at (row, column) of a state, or of its transpose, as two right operands: of 16 rows each.
template <bool TRANSPOSED, unsigned D>
__device__ __forceinline__ void load_right_tall(unsigned (&b)[4], State<D> state, unsigned row, unsigned column) {
    const unsigned lane = threadIdx.x % WARP;
    if (TRANSPOSED) {
        load_matrices(b, state.at(column + lane % 8, row / VECTOR, lane / 8));
    } else {
        load_matrices_transposed(b, state.at(row + lane, column / VECTOR, 0));
    }
}

// The first of this warp's 16 rows of a chunk. Rows have unequal numbers of tokens to see; of the warps that share a
// scheduler, every fourth, one half has many where the other has few.
__device__ __forceinline__ unsigned row_of_warp() {
    const unsigned four = threadIdx.x / WARP / 4, within = threadIdx.x / WARP % 4;
    return (four * 4 + (four % 2 == 0 ? within : 3 - within)) * 16 % CHUNK;
}

// This warp's 16 rows of a chunk, from `row`, as left operands.
template <unsigned D>
__device__ __forceinline__ void load_rows(unsigned (&x)[D / 16][4], Chunk<D> tile, unsigned row) {
#pragma unroll
    for (unsigned k = 0; k < D / 16; k++) {
        load_left(x[k], tile, row, k * 16);
    }
}

// out += ((X Y^T) * M) Z for 16 rows X of a chunk, from `row`. Tokens see earlier ones, or, with LATER, later ones.
template <unsigned D, bool LATER>
__device__ __forceinline__ void attend(float (&out)[D / 8][4], const unsigned (&x)[D / 16][4], Chunk<D> y, Chunk<D> z,
                                       const float *powers, bool documents, const long long *segments,
                                       unsigned row) {
    const unsigned lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (unsigned block = LATER ? row : 0; block < (LATER ? CHUNK : row + 16); block += 16) {
        float scores[2][4] = {};
#pragma unroll
        for (unsigned k = 0; k < D / 16; k++) {
            unsigned b[4];
            load_right<true>(b, y, k * 16, block);
            multiply_add(scores[0], x[k], b[0], b[1]);
            multiply_add(scores[1], x[k], b[2], b[3]);
        }
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
#pragma unroll
            for (unsigned c = 0; c < 4; c++) {
                const unsigned from = row + g + c / 2 * 8, other = block + half * 8 + 2 * t + c % 2;
                const int age = LATER ? int(other - from) : int(from - other);
                const bool sees = age >= 0 && (!documents || segments[from] == segments[other]);
                scores[half][c] = sees ? scores[half][c] * powers[age] : 0.0f;
            }
        }
        const unsigned weighted[4] = {pack(scores[0][0], scores[0][1]), pack(scores[0][2], scores[0][3]),
                                      pack(scores[1][0], scores[1][1]), pack(scores[1][2], scores[1][3])};
#pragma unroll
        for (unsigned n = 0; n < D / 8; n += 2) {
            unsigned b[4];
            load_right<false>(b, z, block, n * 8);
            multiply_add(out[n], weighted, b[0], b[1]);
            multiply_add(out[n + 1], weighted, b[2], b[3]);
        }
    }
}

// out += diag(scales) X S for 16 rows X, or X S^T. A lane's rows are g and g + 8, as are its scales.
template <unsigned D, bool TRANSPOSED>
__device__ __forceinline__ void add_state(float (&out)[D / 8][4], const unsigned (&x)[D / 16][4], State<D> state,
                                          const float (&scales)[2]) {
    // How many 8 columns at once: with 128 channels there are no registers for more than one.
    constexpr unsigned SIDE = D == 128 ? 1 : 2;
#pragma unroll
    for (unsigned n = 0; n < D / 8; n += SIDE) {
        float part[SIDE][4] = {};
#pragma unroll
        for (unsigned k = 0; k < D / 16; k += 2 / SIDE) {
            unsigned b[4];
            if (SIDE == 1) {
                load_right_tall<TRANSPOSED>(b, state, k * 16, n * 8);
            } else {
                load_right<TRANSPOSED>(b, state, k * 16, n * 8);
            }
            multiply_add(part[0], x[k], b[0], b[1]);
            multiply_add(part[SIDE - 1], x[k + 2 / SIDE - 1], b[2], b[3]);
        }
#pragma unroll
        for (unsigned i = 0; i < SIDE; i++) {
#pragma unroll
            for (unsigned c = 0; c < 4; c++) {
                out[n + i][c] += scales[c / 2] * part[i][c];
            }
        }
    }
}

// O of (Q, K, V), or dQ of (dO, V, K), with the states S. Grid (B K, N) of 2 CHUNK threads; each warp has 16 rows.
template <unsigned D, bool GRADIENT, bool ENTERED>
__device__ __forceinline__ void outputs(const bf16 *x_bhtd, const bf16 *y_bktd, const bf16 *z_bktd,
                                        const bf16 *states_bhndd, const float *log2_gamma_h,
                                        const long long *segments_bt, bf16 *out_bhtd, unsigned tokens, unsigned heads,
                                        unsigned kv_heads) {
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr unsigned ROWS = Chunk<D>::BYTES;
    const unsigned tiles = shared_address(shared);
    const Chunk<D> x_rows{tiles}, y_rows{tiles + ROWS}, z_rows{tiles + 2 * ROWS};
    const State<D> state{tiles + 3 * ROWS};
    __shared__ long long segments[CHUNK];
    __shared__ float powers[CHUNK];

    const unsigned kv_head = blockIdx.x, chunk = blockIdx.y;
    const unsigned group = heads / kv_heads, chunks = pieces_of(tokens, CHUNK);
    const unsigned token = chunk * CHUNK, rows = min(CHUNK, tokens - token);
    const bool entered = ENTERED || chunk != 0;
    const unsigned row = row_of_warp(), g = threadIdx.x % WARP / 4;

    const auto begin_rows = [&](unsigned head) {
        copy_rows(x_rows, x_bhtd + channels<D>(head, tokens, token), rows, D);
    };
    const auto begin_state = [&](unsigned head) {
        copy_state(state, states_bhndd + state_at<D, ENTERED>(head, chunks, chunk));
    };

    const bool documents = !ENTERED && segments_bt != nullptr;
    long long running = 0;
    if (documents) {
        const long long *const own = segments_bt + size_t(kv_head / kv_heads) * tokens + token;
        running = chunk == 0 ? 0 : own[-1];
        copy_segments<CHUNK>(segments, own, rows);
    }
    const size_t kv_row = channels<D>(kv_head, tokens, token);
    copy_rows(y_rows, y_bktd + kv_row, rows, D);
    copy_rows(z_rows, z_bktd + kv_row, rows, D);
    begin_rows(kv_head * group);
    end_copies();
    if (entered) {
        begin_state(kv_head * group);
    }
    end_copies();

    // Rows and state of a head are fetched while the other of the two is in use.
    for (unsigned member = 0; member < group; member++) {
        const unsigned head = kv_head * group + member;
        if (threadIdx.x < CHUNK) {
            powers[threadIdx.x] = exp2f(log2_gamma_h[head % heads] * threadIdx.x);
        }
        await_copies<1>();
        __syncthreads();
        unsigned x[D / 16][4];
        load_rows<D>(x, x_rows, row);
        __syncthreads();
        if (member + 1 < group) {
            begin_rows(head + 1);
        }
        end_copies();
        float out[D / 8][4] = {};
        attend<D, false>(out, x, y_rows, z_rows, powers, documents, segments, row);

        await_copies<1>();
        __syncthreads();
        if (entered) {
            float scales[2];
#pragma unroll
            for (unsigned half = 0; half < 2; half++) {
                const unsigned own = row + g + half * 8;
                scales[half] = !documents || segments[own] == running ? powers[own] : 0.0f;
            }
            add_state<D, GRADIENT>(out, x, state, scales);
            __syncthreads();
            if (member + 1 < group) {
                begin_state(head + 1);
            }
        }
        end_copies();
        store_rows<D>(out_bhtd + channels<D>(head, tokens, token), out, row, rows);
    }
}

// dK and dV, with the states G. Grid (B K, N) of 4 CHUNK threads; in the first half, each warp has 16 rows
// of dK, in the other of dV.
template <unsigned D>
__device__ __forceinline__ void key_value_gradients(const bf16 *q_bhtd, const bf16 *k_bktd, const bf16 *v_bktd,
                                                    const bf16 *do_bhtd, const bf16 *states_bhndd,
                                                    const float *log2_gamma_h, const long long *segments_bt,
                                                    bf16 *dk_bktd, bf16 *dv_bktd, unsigned tokens, unsigned heads,
                                                    unsigned kv_heads) {
    constexpr unsigned POWERS = CHUNK + 1;
    extern __shared__ __align__(128) unsigned char shared[];
    constexpr unsigned ROWS = Chunk<D>::BYTES;
    const unsigned tiles = shared_address(shared);
    const Chunk<D> q_rows{tiles}, do_rows{tiles + ROWS}, k_rows{tiles + 2 * ROWS}, v_rows{tiles + 3 * ROWS};
    const State<D> state{tiles + 4 * ROWS};
    __shared__ long long segments[CHUNK];
    __shared__ float powers[POWERS];

    const unsigned kv_head = blockIdx.x, chunk = blockIdx.y;
    const unsigned group = heads / kv_heads, chunks = pieces_of(tokens, CHUNK);
    const unsigned token = chunk * CHUNK, rows = min(CHUNK, tokens - token);
    const bool last = chunk + 1 == chunks, keys = threadIdx.x < 2 * CHUNK;
    const unsigned row = row_of_warp(), g = threadIdx.x % WARP / 4;

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

    float out[D / 8][4] = {};
    for (unsigned member = 0; member < group; member++) {
        const unsigned head = kv_head * group + member;
        if (threadIdx.x < POWERS) {
            powers[threadIdx.x] = exp2f(log2_gamma_h[head % heads] * threadIdx.x);
        }
        await_copies<1>();
        __syncthreads();
        unsigned x[D / 16][4];
        load_rows<D>(x, Chunk<D>{tiles + (keys ? 3 : 2) * ROWS}, row);
        attend<D, true>(out, x, keys ? do_rows : q_rows, keys ? q_rows : do_rows, powers, documents, segments, row);
        __syncthreads();
        if (member + 1 < group) {
            begin_rows(head + 1);
        }
        end_copies();

        await_copies<1>();
        __syncthreads();
        if (!last) {
            float scales[2];
#pragma unroll
            for (unsigned half = 0; half < 2; half++) {
                const unsigned own = row + g + half * 8;
                const bool reaches = !documents || segments[own] == segments[CHUNK - 1];
                scales[half] = reaches ? powers[CHUNK - own] : 0.0f;
            }
            // As two branches of one `if` these are woven into each other, and need more registers than there are.
            if (keys) {
                add_state<D, true>(out, x, state, scales);
            }
            __syncwarp();
            if (!keys) {
                add_state<D, false>(out, x, state, scales);
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
