// Products of a weight with a few rows: y [n, out] = x [n, in] W^T, for n so small that reading W is all the work.
//
// A warp's product has 16 rows of W and 8 rows of x. Which columns of a block of 32 are summed in which of its products does
// not matter as long as W and x agree; so a lane takes 16 bytes in a row of W, columns 8t to 8t + 7, and the same of x, and
// nothing goes through shared memory but the sums of the block's warps, each of which has a part of the columns.
#include "relay.cuh"
#include "warp.cuh"

constexpr int COLUMNS = 32;

// One weight, and what it is multiplied with.
struct Product {
    const bf16 *weight;  // [out, in]
    const bf16 *x;       // [n, in], rows `x_stride` apart
    bf16 *y;             // [n, out], rows `y_stride` apart
    int in, x_stride, y_stride;
};

// TILES times 16 rows of W by 8 PARTS rows of x, by so many WARPS, which fetch DEPTH blocks of columns ahead. GATED: the 16
// rows are 8 of the gate and the same 8 of up, `up` rows further on, and y = silu(gate) * up has as many columns as either.
template <int WARPS, int TILES, int DEPTH, int PARTS, bool GATED>
__device__ __forceinline__ void thin(const Product &p, int tile, int n, int up) {
    constexpr int HEIGHT = 16 * TILES, WIDTH = 8 * PARTS;
    __shared__ float sums[WARPS][WIDTH][HEIGHT + 1];
    const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int blocks = p.in / COLUMNS, share = (blocks + WARPS - 1) / WARPS;
    const int begin = min(warp * share, blocks), end = min(begin + share, blocks);

    const bf16 *w[TILES][2];
#pragma unroll
    for (int i = 0; i < TILES; ++i) {
        const int row = GATED ? (tile * TILES + i) * 8 + g : (tile * TILES + i) * 16 + g;
        w[i][0] = p.weight + static_cast<size_t>(row) * p.in + 8 * t;
        w[i][1] = p.weight + static_cast<size_t>(row + (GATED ? up : 8)) * p.in + 8 * t;
    }
    uint4 now[DEPTH][TILES][2];
    auto fetch = [&](int from) {
#pragma unroll
        for (int u = 0; u < DEPTH; ++u)
#pragma unroll
            for (int i = 0; i < TILES; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    now[u][i][half] = from + u < end ? load_once(w[i][half] + (from + u) * COLUMNS) : make_uint4(0, 0, 0, 0);
    };
    fetch(begin);
    admit_next();
    await_earlier();

    float c[TILES][PARTS][4] = {};
    for (int block = begin; block < end; block += DEPTH) {
        uint4 b[DEPTH][PARTS];
#pragma unroll
        for (int u = 0; u < DEPTH; ++u)
#pragma unroll
            for (int j = 0; j < PARTS; ++j) {
                const int row = 8 * j + g;
                b[u][j] = row < n && block + u < end
                              ? load(p.x + static_cast<size_t>(row) * p.x_stride + (block + u) * COLUMNS + 8 * t)
                              : make_uint4(0, 0, 0, 0);
            }
        uint4 a[DEPTH][TILES][2];
#pragma unroll
        for (int u = 0; u < DEPTH; ++u)
#pragma unroll
            for (int i = 0; i < TILES; ++i) a[u][i][0] = now[u][i][0], a[u][i][1] = now[u][i][1];
        fetch(block + DEPTH);
#pragma unroll
        for (int u = 0; u < DEPTH; ++u)
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const uint4 f = a[u][i][0], s = a[u][i][1];
                const unsigned low[4] = {f.x, s.x, f.y, s.y}, high[4] = {f.z, s.z, f.w, s.w};
#pragma unroll
                for (int j = 0; j < PARTS; ++j) {
                    multiply_add(c[i][j], low, b[u][j].x, b[u][j].y);
                    multiply_add(c[i][j], high, b[u][j].z, b[u][j].w);
                }
            }
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < PARTS; ++j) {
            sums[warp][8 * j + 2 * t][16 * i + g] = c[i][j][0];
            sums[warp][8 * j + 2 * t + 1][16 * i + g] = c[i][j][1];
            sums[warp][8 * j + 2 * t][16 * i + g + 8] = c[i][j][2];
            sums[warp][8 * j + 2 * t + 1][16 * i + g + 8] = c[i][j][3];
        }
    __syncthreads();
    auto sum = [&](int row, int column) {
        float total = 0.0f;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) total += sums[i][row][column];
        return total;
    };
    constexpr int OUT = GATED ? HEIGHT / 2 : HEIGHT;
    for (int at = threadIdx.x; at < WIDTH * OUT; at += blockDim.x) {
        const int row = at / OUT, column = at % OUT;
        if (row >= n) break;
        float y;
        if (GATED) {
            const int place = column / 8 * 16 + column % 8;
            const float gate = sum(row, place);
            y = sum(row, place + 8) * gate * __fdividef(1.0f, 1.0f + __expf(-gate));
        } else {
            y = sum(row, column);
        }
        p.y[static_cast<size_t>(row) * p.y_stride + tile * OUT + column] = to_bf16(y);
    }
}

// Blocks from `split` on work on the second product. One product: `split` is gridDim.x. As many blocks as SIDE_BY_SIDE have room on
// a processor: what they may have of its registers.
#define THIN(NAME, WARPS, TILES, DEPTH, SIDE_BY_SIDE, PARTS)                                                          \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, SIDE_BY_SIDE) thin_##NAME##_##PARTS(                     \
        const bf16 *w0, const bf16 *x0, bf16 *y0, int in0, int xs0, int ys0, const bf16 *w1, const bf16 *x1, bf16 *y1, \
        int in1, int xs1, int ys1, int split, int n) {                                                                \
        const int block = blockIdx.x;                                                                                 \
        const Product p = block < split ? Product{w0, x0, y0, in0, xs0, ys0} : Product{w1, x1, y1, in1, xs1, ys1};    \
        thin<WARPS, TILES, DEPTH, PARTS, false>(p, block < split ? block : block - split, n, 0);                      \
    }                                                                                                                 \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, SIDE_BY_SIDE) thin_gated_##NAME##_##PARTS(               \
        const bf16 *w, const bf16 *x, bf16 *y, int in, int xs, int ys, int up, int n) {                               \
        thin<WARPS, TILES, DEPTH, PARTS, true>(Product{w, x, y, in, xs, ys}, blockIdx.x, n, up);                      \
    }

// The second reads x half as often. Of nineteen such kernels no three do better than these two; clusters of blocks that keep x in
// shared memory, and fetch W through rings there, do worse.
#define THIN_FOR(PARTS)                \
    THIN(narrow, 8, 1, 4, 3, PARTS)    \
    THIN(wide, 16, 2, 2, 1, PARTS)

THIN_FOR(1)
THIN_FOR(2)
