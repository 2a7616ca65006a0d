// Linear attention with decay, chunkwise: o_t = sum over j <= t of gamma^(t-j) (q_t . k_j) v_j, and its gradients.
//
// Rows of T tokens are cut into N chunks of CHUNK; the last may be short. With S_n the d x d state at boundary n, on
// entry to chunk n, i and j indices inside a chunk, M[i, j] = gamma^(i-j) for j <= i and G_n the gradient of S_n:
//
//     O_n = ((Q K^T) * M) V  + diag(gamma^i) Q S_n               S_{n+1} = gamma^C S_n + (diag(gamma^(C-i)) K)^T V
//     dQ  = ((dO V^T) * M) K + diag(gamma^i) dO S_n^T            G_n = gamma^C G_{n+1} + (diag(gamma^i) Q)^T dO
//     dK  = ((V dO^T) * M^T) Q  + diag(gamma^(C-j)) V G_{n+1}^T
//     dV  = ((K Q^T) * M^T) dO  + diag(gamma^(C-j)) K G_{n+1}
//
// So there are three kernels: `states` walks the chunks of a row in either direction and keeps S or G at the N - 1
// inner boundaries; `outputs` makes O, and dQ, which has the same form; `key_value_gradients` makes dK and dV. The two
// latter take all chunks at once. Query head h reads head h / (H / K) of K and V: a block of threads takes such a group
// of heads one by one, so that K and V are read once and their gradients are summed in registers, in a fixed order.
//
// Every exponent is relative and not negative. Documents only put zeros into these weights: a token has another, or
// what the state brings from a boundary, or leaves something in it, only where both are of one segment; a boundary's
// segment is that of the token before it, 0 before the row.
//
// ENTERED: a row goes on from a state S_0 [B, H, d, d], fp32, that others left, and leaves the one behind its last token in
// its place; then S_0 is kept like the states at inner boundaries, and there are no documents.
//
// q, o and their gradients are [B, H, T, d], k, v and theirs [B, K, T, d], segments i64 [B, T] or null; d is 64 or 128.
// bf16 in and out; products of bf16 are summed in fp32, as are the states, which are kept in bf16 between kernels.

#include "warp.cuh"

// Tokens of a chunk: a multiple of PIECE.
constexpr unsigned CHUNK = 128;
// `states` takes pieces of PIECE tokens, of which STAGES are in flight, and COLUMNS columns of the state in a block.
constexpr unsigned PIECE = 64;
constexpr unsigned STAGES = 3;
constexpr unsigned COLUMNS = 64;
constexpr unsigned PIECES = CHUNK / PIECE;

// COUNT rows of WIDTH bf16 in shared memory. The vectors of each 8 rows are mixed, so that one column of vectors lies
// in different banks. `vector` and `next`, 0 or 1 after an even vector, are apart so that the lane's part of an address
// is computed once and the constant part costs one exclusive or.
template <unsigned COUNT, unsigned WIDTH>
struct Rows {
    static constexpr unsigned BYTES = COUNT * WIDTH * sizeof(bf16);
    unsigned base;

    __device__ __forceinline__ unsigned at(unsigned row, unsigned vector, unsigned next = 0) const {
        return base + ((row * (WIDTH / VECTOR) + (next ^ row % 8)) * 16 ^ vector * 16);
    }
};

// A state [D, D] of bf16 as blocks of 8 x 8, each 128 bytes in a piece, here and in global memory: `states` then writes
// whole lines from its registers, and no two rows of a block share a bank.
template <unsigned D>
struct State {
    static constexpr unsigned BYTES = D * D * sizeof(bf16);
    unsigned base;

    __device__ __forceinline__ unsigned at(unsigned row, unsigned vector, unsigned next) const {
        return base + ((row / 8 * (D / 8) + next) * 8 + row % 8) * 16 + vector * 128;
    }
};

// The 16 x 16 at (row, column) as left operand of a product, from where its transpose lies.
template <class Tile>
__device__ __forceinline__ void load_left_transposed(unsigned (&a)[4], Tile tile, unsigned row, unsigned column) {
    const unsigned lane = threadIdx.x % WARP;
    load_matrices_transposed(a, tile.at(column + lane / 16 * 8 + lane % 8, row / VECTOR, lane / 8 % 2));
}

// The 16 x 16 at (row, column) of the tile, or of its transpose, as two right operands: of 8 columns each.
template <bool TRANSPOSED, class Tile>
__device__ __forceinline__ void load_right(unsigned (&b)[4], Tile tile, unsigned row, unsigned column) {
    const unsigned lane = threadIdx.x % WARP;
    if (TRANSPOSED) {
        load_matrices(b, tile.at(column + lane / 16 * 8 + lane % 8, row / VECTOR, lane / 8 % 2));
    } else {
        load_matrices_transposed(b, tile.at(row + lane % 16, column / VECTOR, lane / 16));
    }
}

// Begins to copy `rows` rows, `stride` apart; zeros follow them.
template <template <unsigned, unsigned> class Tile, unsigned COUNT, unsigned WIDTH>
__device__ __forceinline__ void copy_rows(Tile<COUNT, WIDTH> to, const bf16 *from, unsigned rows, unsigned stride) {
    for (unsigned i = threadIdx.x; i < COUNT * (WIDTH / VECTOR); i += blockDim.x) {
        const unsigned row = i / (WIDTH / VECTOR), vector = i % (WIDTH / VECTOR);
        const bool there = row < rows;
        copy_16(to.at(row, vector), from + (there ? row * stride + vector * VECTOR : 0), there);
    }
}

// Begins to copy a state.
template <unsigned D>
__device__ __forceinline__ void copy_state(State<D> to, const bf16 *from) {
    for (unsigned i = threadIdx.x; i < D * D / VECTOR; i += blockDim.x) {
        copy_16(to.base + i * 16, from + i * VECTOR, true);
    }
}

// Begins to copy the segments of `rows` tokens; zeros follow them.
template <unsigned COUNT>
__device__ __forceinline__ void copy_segments(const long long *to, const long long *from, unsigned rows) {
    if (threadIdx.x < COUNT) {
        const bool there = threadIdx.x < rows;
        copy_8(shared_address(to + threadIdx.x), from + (there ? threadIdx.x : 0), there);
    }
}

// Where a token of one of B H heads has its first channel; [B, H, T, D].
template <unsigned D>
__device__ __forceinline__ size_t channels(unsigned head, unsigned tokens, unsigned token) {
    return (size_t(head) * tokens + token) * D;
}

// Where one of B H heads has its state at an inner boundary, 1 <= boundary < chunks; [B, H, N - 1, D, D]. ENTERED: from 0 on,
// [B, H, N, D, D].
template <unsigned D, bool ENTERED>
__device__ __forceinline__ size_t state_at(unsigned head, unsigned chunks, unsigned boundary) {
    constexpr unsigned FIRST = ENTERED ? 0 : 1;
    return (size_t(head) * (chunks - FIRST) + boundary - FIRST) * (D * D);
}

__device__ __forceinline__ unsigned pieces_of(unsigned tokens, unsigned size) {
    return (tokens + size - 1) / size;
}

// Moves a thread's part of a state between its registers and where the state lies in fp32.
template <unsigned D, class Move>
__device__ __forceinline__ void each_pair(float (&state)[D / 64][COLUMNS / 8][4], float *to, unsigned first_row,
                                          Move move) {
    const unsigned lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (unsigned i = 0; i < D / 64; i++) {
#pragma unroll
        for (unsigned j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
            for (unsigned half = 0; half < 2; half++) {
                const unsigned row = first_row + i * 16 + half * 8 + g;
                float2 *const pair = reinterpret_cast<float2*>(to + row * D + j * 8 + 2 * t);
                move(*pair, state[i][j][2 * half], state[i][j][2 * half + 1]);
            }
        }
    }
}

// The states [B, H, N - 1, D, D] at the inner boundaries: S of K and V, or, walking back, G of Q and dO. The two are
// [B, source_heads, T, D]. Grid (B H, D / COLUMNS) of 128 threads; each warp has D / 4 rows of the state.
template <unsigned D, bool BACK, bool ENTERED>
__device__ __forceinline__ void states(const bf16 *left, const bf16 *right, const float *log2_gamma_h,
                                       const long long *segments_bt, bf16 *states_bhndd, float *state_bhdd,
                                       unsigned tokens, unsigned heads, unsigned source_heads) {
    static_assert(!(BACK && ENTERED), "gradients go back to no state before the row");
    using Left = Rows<PIECE, D>;
    using Right = Rows<PIECE, COLUMNS>;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ long long stage_segments[STAGES][PIECE];
    __shared__ float weights[PIECE];
    const unsigned tiles = shared_address(shared);
    const auto left_at = [&](unsigned stage) { return Left{tiles + stage * Left::BYTES}; };
    const auto right_at = [&](unsigned stage) {
        return Right{tiles + STAGES * Left::BYTES + stage * Right::BYTES};
    };

    const unsigned head = blockIdx.x, first_column = blockIdx.y * COLUMNS;
    const unsigned lane = threadIdx.x % WARP, t = lane % 4, first_row = threadIdx.x / WARP * (D / 4);
    const unsigned source_head = head / (heads / source_heads), row = head / heads;
    const unsigned chunks = pieces_of(tokens, CHUNK), pieces = pieces_of(tokens, PIECE);
    const unsigned steps = ENTERED ? pieces : BACK ? pieces - PIECES : (chunks - 1) * PIECES;
    const bool documents = !ENTERED && segments_bt != nullptr;
    const long long *const segments = documents ? segments_bt + size_t(row) * tokens : nullptr;

    const auto piece_of = [&](unsigned step) { return BACK ? pieces - 1 - step : step; };
    const auto begin = [&](unsigned step) {
        if (step < steps) {
            const unsigned token = piece_of(step) * PIECE, rows = min(PIECE, tokens - token), stage = step % STAGES;
            const size_t from = channels<D>(source_head, tokens, token);
            copy_rows(left_at(stage), left + from, rows, D);
            copy_rows(right_at(stage), right + from + first_column, rows, D);
            if (segments != nullptr) {
                copy_segments<PIECE>(stage_segments[stage], segments + token, rows);
            }
        }
        end_copies();
    };

    // Weights at the boundary that a piece leads to: of its token threadIdx.x, and of the state at the other boundary.
    const float log2_gamma = log2_gamma_h[head % heads];
    const float own_power = exp2f(log2_gamma * (BACK ? threadIdx.x : PIECE - min(threadIdx.x, PIECE)));
    const float piece_power = exp2f(log2_gamma * PIECE);

    float state[D / 64][COLUMNS / 8][4] = {};
    const auto keep = [&](unsigned boundary) {
        bf16 *const to = states_bhndd + state_at<D, ENTERED>(head, chunks, boundary);
        unsigned *const pairs = reinterpret_cast<unsigned*>(to) + lane;
#pragma unroll
        for (unsigned i = 0; i < D / 64; i++) {
#pragma unroll
            for (unsigned j = 0; j < COLUMNS / 8; j++) {
                const unsigned block = (first_row / 8 + 2 * i) * (D / 8) + first_column / 8 + j;
                pairs[block * 32] = pack(state[i][j][0], state[i][j][1]);
                pairs[(block + D / 8) * 32] = pack(state[i][j][2], state[i][j][3]);
            }
        }
    };
    for (unsigned step = 0; step < STAGES - 1; step++) {
        begin(step);
    }
    float *const own_state = ENTERED ? state_bhdd + size_t(head) * (D * D) + first_column : nullptr;
    if (ENTERED) {
        each_pair<D>(state, own_state, first_row, [](const float2 &from, float &x, float &y) { x = from.x, y = from.y; });
        keep(0);
    }
    for (unsigned step = 0; step < steps; step++) {
        await_copies<STAGES - 2>();
        __syncthreads();
        begin(step + STAGES - 1);

        const unsigned piece = piece_of(step), stage = step % STAGES;
        float carry = piece_power, power = own_power;
        bool reaches = true;
        if (ENTERED && step + 1 == steps) {
            // It may be short, and what it leads to is the end of the row.
            const unsigned rows = tokens - piece * PIECE;
            carry = exp2f(log2_gamma * rows);
            power = exp2f(log2_gamma * (rows - min(threadIdx.x, rows)));
        }
        if (segments != nullptr) {
            const long long *const own = stage_segments[stage];
            const long long before = piece == 0 ? 0 : segments[piece * PIECE - 1], after = own[PIECE - 1];
            carry = before == after ? carry : 0.0f;
            reaches = threadIdx.x < PIECE && own[threadIdx.x] == (BACK ? before : after);
        }
        if (threadIdx.x < PIECE) {
            weights[threadIdx.x] = reaches ? power : 0.0f;
        }
        __syncthreads();

#pragma unroll
        for (unsigned i = 0; i < D / 64; i++) {
#pragma unroll
            for (unsigned j = 0; j < COLUMNS / 8; j++) {
#pragma unroll
                for (unsigned c = 0; c < 4; c++) {
                    state[i][j][c] *= carry;
                }
            }
        }
#pragma unroll
        for (unsigned token = 0; token < PIECE; token += 16) {
            unsigned a[D / 64][4];
#pragma unroll
            for (unsigned i = 0; i < D / 64; i++) {
                load_left_transposed(a[i], left_at(stage), first_row + i * 16, token);
#pragma unroll
                for (unsigned r = 0; r < 4; r++) {
                    const float *const pair = weights + token + r / 2 * 8 + 2 * t;
                    a[i][r] = pack(low_half(a[i][r]) * pair[0], high_half(a[i][r]) * pair[1]);
                }
            }
#pragma unroll
            for (unsigned j = 0; j < COLUMNS / 8; j += 2) {
                unsigned b[4];
                load_right<false>(b, right_at(stage), token, j * 8);
#pragma unroll
                for (unsigned i = 0; i < D / 64; i++) {
                    multiply_add(state[i][j], a[i], b[0], b[1]);
                    multiply_add(state[i][j + 1], a[i], b[2], b[3]);
                }
            }
        }

        const unsigned reached = BACK ? piece : piece + 1;
        if (reached % PIECES == 0 && !(ENTERED && step + 1 == steps)) {
            keep(reached / PIECES);
        }
    }
    if (ENTERED) {
        each_pair<D>(state, own_state, first_row, [](float2 &to, float x, float y) { to = make_float2(x, y); });
    }
}

// Writes 16 rows of a chunk, from `row`, as far as the chunk goes.
template <unsigned D>
__device__ __forceinline__ void store_rows(bf16 *to, const float (&out)[D / 8][4], unsigned row, unsigned rows) {
    const unsigned lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (unsigned n = 0; n < D / 8; n += 4) {
#pragma unroll
        for (unsigned half = 0; half < 2; half++) {
            unsigned pairs[4];
#pragma unroll
            for (unsigned i = 0; i < 4; i++) {
                pairs[i] = pack(out[n + i][2 * half], out[n + i][2 * half + 1]);
            }
            transpose_in_group(pairs);
            const unsigned own = row + g + half * 8;
            if (own < rows) {
                store(to + own * D + (n + t) * 8, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
            }
        }
    }
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#include "attention_warpgroups.cuh"
#else
#include "attention_warps.cuh"
#endif

#define ENTRY extern "C" __global__ void

#define ATTENTION(D)                                                                                                   \
    ENTRY __launch_bounds__(128, 2) attention_states_##D(                                                              \
        const bf16 *k, const bf16 *v, const float *log2_gamma, const long long *segments, bf16 *kept, unsigned tokens, \
        unsigned heads, unsigned kv_heads) {                                                                           \
        states<D, false, false>(k, v, log2_gamma, segments, kept, nullptr, tokens, heads, kv_heads);                   \
    }                                                                                                                  \
    ENTRY __launch_bounds__(128, 2) attention_states_from_##D(                                                         \
        const bf16 *k, const bf16 *v, const float *log2_gamma, bf16 *kept, float *state, unsigned tokens,              \
        unsigned heads, unsigned kv_heads) {                                                                           \
        states<D, false, true>(k, v, log2_gamma, nullptr, kept, state, tokens, heads, kv_heads);                       \
    }                                                                                                                  \
    ENTRY __launch_bounds__(128, 2) attention_state_gradients_##D(                                                     \
        const bf16 *q, const bf16 *d_o, const float *log2_gamma, const long long *segments, bf16 *kept,                \
        unsigned tokens, unsigned heads) {                                                                             \
        states<D, true, false>(q, d_o, log2_gamma, segments, kept, nullptr, tokens, heads, heads);                     \
    }                                                                                                                  \
    ENTRY __launch_bounds__(2 * CHUNK, 128 / CHUNK) attention_outputs_##D(                                             \
        const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *kept, const float *log2_gamma,                        \
        const long long *segments, bf16 *o, unsigned tokens, unsigned heads, unsigned kv_heads) {                      \
        outputs<D, false, false>(q, k, v, kept, log2_gamma, segments, o, tokens, heads, kv_heads);                     \
    }                                                                                                                  \
    ENTRY __launch_bounds__(2 * CHUNK, 128 / CHUNK) attention_outputs_from_##D(                                        \
        const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *kept, const float *log2_gamma, bf16 *o,               \
        unsigned tokens, unsigned heads, unsigned kv_heads) {                                                          \
        outputs<D, false, true>(q, k, v, kept, log2_gamma, nullptr, o, tokens, heads, kv_heads);                       \
    }                                                                                                                  \
    ENTRY __launch_bounds__(2 * CHUNK, 128 / CHUNK) attention_query_gradients_##D(                                     \
        const bf16 *d_o, const bf16 *v, const bf16 *k, const bf16 *kept, const float *log2_gamma,                      \
        const long long *segments, bf16 *dq, unsigned tokens, unsigned heads, unsigned kv_heads) {                     \
        outputs<D, true, false>(d_o, v, k, kept, log2_gamma, segments, dq, tokens, heads, kv_heads);                   \
    }                                                                                                                  \
    ENTRY __launch_bounds__(4 * CHUNK, 128 / CHUNK) attention_key_value_gradients_##D(                                 \
        const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *d_o, const bf16 *kept, const float *log2_gamma,       \
        const long long *segments, bf16 *dk, bf16 *dv, unsigned tokens, unsigned heads, unsigned kv_heads) {           \
        key_value_gradients<D>(q, k, v, d_o, kept, log2_gamma, segments, dk, dv, tokens, heads, kv_heads);             \
    }

ATTENTION(64)
ATTENTION(128)
