// The gradient's norm, and AdamW on flat buffers.
//
// The operations of AdamW are those of the libtorch form, in its order and each rounded by itself, so that both agree to
// the bit.
#include "bits.cuh"

// Each block leaves its part of the sum of squares in `parts` [gridDim.x].
extern "C" __global__ void __launch_bounds__(512) square_parts(const float *x, double *parts, long long count) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long vectors = count / 4;
    double sum = 0.0;
#pragma unroll 4
    for (long long i = thread; i < vectors; i += stride) {
        const float4 v = reinterpret_cast<const float4 *>(x)[i];
        const double a = v.x, b = v.y, c = v.z, d = v.w;
        sum += (a * a + b * b) + (c * c + d * d);
    }
    if (const long long i = vectors * 4 + thread; i < count) sum += static_cast<double>(x[i]) * x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The sum of the parts. One block.
extern "C" __global__ void __launch_bounds__(512) square_sum(const double *parts, double *squares, int count) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += parts[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *squares = sum;
}

// What is the same for all elements of one update. `scale` is what the sum of gradients is multiplied by.
struct Update {
    float scale, beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, decay;
    unsigned long long rounding;
};

__device__ __forceinline__ void adamw_one(float &master, float gradient, float &average, float &square, const Update &u,
                                          bool decays) {
    gradient = __fmul_rn(gradient, u.scale);
    average = __fadd_rn(__fmul_rn(average, u.beta1), __fmul_rn(gradient, u.one_minus_beta1));
    square = __fadd_rn(__fmul_rn(square, u.beta2), __fmul_rn(__fmul_rn(gradient, gradient), u.one_minus_beta2));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(square), u.root_correction), u.eps);
    if (decays) master = __fmul_rn(master, u.decay);
    master = __fsub_rn(master, __fmul_rn(__fdiv_rn(average, denominator), u.step_size));
}

// Moments as they are kept: fp32 as they are, bf16 rounded at random.
__device__ __forceinline__ float widened(float x) { return x; }

__device__ __forceinline__ float widened(bf16 x) { return to_float(x); }

__device__ __forceinline__ void keep(float average, float square, float &kept_average, float &kept_square,
                                     unsigned long long, long long) {
    kept_average = average;
    kept_square = square;
}

__device__ __forceinline__ void keep(float average, float square, bf16 &kept_average, bf16 &kept_square,
                                     unsigned long long key, long long index) {
    const unsigned noise = static_cast<unsigned>(number(key, index) >> 32);
    kept_average = round_at_random(average, noise >> 16);
    kept_square = round_at_random(square, noise & 0xffffu);
}

// Elements before `decayed` shrink by weight decay; `first` is the index of the first one.
template <typename Moment>
struct AdamW {
    bf16 *param;
    short *remainder;
    const float *gradient;
    Moment *average, *square;
    long long decayed, first;
    Update update;

    template <int N>
    __device__ void at(long long i) const {
        Pack<bf16, N> p = read<N>(param + i);
        Pack<short, N> r = read<N>(remainder + i);
        const Pack<float, N> g = read<N>(gradient + i);
        Pack<Moment, N> m = read<N>(average + i), v = read<N>(square + i);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            float master = join(p.x[n], r.x[n]), wide_m = widened(m.x[n]), wide_v = widened(v.x[n]);
            adamw_one(master, g.x[n], wide_m, wide_v, update, i + n < decayed);
            split(master, p.x[n], r.x[n]);
            keep(wide_m, wide_v, m.x[n], v.x[n], update.rounding, first + i + n);
        }
        write(param + i, p);
        write(remainder + i, r);
        write(average + i, m);
        write(square + i, v);
    }
};

#define ADAMW(NAME, MOMENT)                                                                                            \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        NAME(bf16 *param, short *remainder, const float *gradient, MOMENT *average, MOMENT *square, long long count,   \
             long long decayed, long long first, unsigned long long rounding, float scale, float beta1,                \
             float one_minus_beta1, float beta2, float one_minus_beta2, float eps, float step_size,                    \
             float root_correction, float decay) {                                                                     \
        const Update update = {scale, beta1,     one_minus_beta1, beta2, one_minus_beta2,                              \
                               eps,   step_size, root_correction, decay, rounding};                                    \
        AdamW<MOMENT> work = {param, remainder, gradient, average, square, decayed, first, update};                    \
        sweep<4>(count, work);                                                                                         \
    }

ADAMW(adamw, float)
ADAMW(adamw_bf16_moments, bf16)
