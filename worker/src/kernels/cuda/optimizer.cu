// The gradient's norm, its clipping and AdamW on flat fp32 buffers.
//
// The operations of AdamW are those of the libtorch form, in its order and each rounded by itself, so that both agree to the
// bit wherever libtorch rounds right (its square root on the processor does not always).
#include "common.cuh"

// What the update reads from device memory.
struct Control {
    float scale;  // what the sum of gradients is multiplied by
    float skip;   // not 0: the step changes nothing
};

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

// From the squared norm of a gradient, and the loss, both summed over the targets of all ranks, to what the update multiplies
// the gradient by. One thread.
extern "C" __global__ void clip(const double *squares, const double *loss_sum, double *norm, Control *control,
                                double targets, double limit) {
    const double scale = 1.0 / targets;
    const double mean_norm = sqrt(*squares) * scale;
    *norm = mean_norm;
    control->scale = static_cast<float>(scale * (mean_norm > limit ? limit / mean_norm : 1.0));
    control->skip = isfinite(mean_norm) && isfinite(*loss_sum * scale) ? 0.0f : 1.0f;
}

// Constants of one update, equal for all elements.
struct Update {
    float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, decay;
};

__device__ __forceinline__ void adamw_one(float &master, float gradient, float &average, float &square, const Update &u,
                                          bool decays) {
    average = __fadd_rn(__fmul_rn(average, u.beta1), __fmul_rn(gradient, u.one_minus_beta1));
    square = __fadd_rn(__fmul_rn(square, u.beta2), __fmul_rn(__fmul_rn(gradient, gradient), u.one_minus_beta2));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(square), u.root_correction), u.eps);
    if (decays) master = __fmul_rn(master, u.decay);
    master = __fsub_rn(master, __fmul_rn(__fdiv_rn(average, denominator), u.step_size));
}

// Elements before `decayed` shrink by weight decay. `compute`, where not null, gets the rounded masters.
extern "C" __global__ void __launch_bounds__(256)
    adamw(float *master, const float *gradient, float *average, float *square, bf16 *compute, const Control *control,
          long long count, long long decayed, float beta1, float one_minus_beta1, float beta2, float one_minus_beta2,
          float eps, float step_size, float root_correction, float decay) {
    if (control->skip != 0.0f) return;
    const float scale = control->scale;
    const Update u = {beta1, one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, decay};
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long vectors = count / 4;
    for (long long i = thread; i < vectors; i += stride) {
        float4 p = reinterpret_cast<float4 *>(master)[i], g = reinterpret_cast<const float4 *>(gradient)[i];
        float4 m = reinterpret_cast<float4 *>(average)[i], v = reinterpret_cast<float4 *>(square)[i];
        adamw_one(p.x, __fmul_rn(g.x, scale), m.x, v.x, u, 4 * i < decayed);
        adamw_one(p.y, __fmul_rn(g.y, scale), m.y, v.y, u, 4 * i + 1 < decayed);
        adamw_one(p.z, __fmul_rn(g.z, scale), m.z, v.z, u, 4 * i + 2 < decayed);
        adamw_one(p.w, __fmul_rn(g.w, scale), m.w, v.w, u, 4 * i + 3 < decayed);
        reinterpret_cast<float4 *>(master)[i] = p;
        reinterpret_cast<float4 *>(average)[i] = m;
        reinterpret_cast<float4 *>(square)[i] = v;
        if (compute != nullptr) reinterpret_cast<uint2 *>(compute)[i] = make_uint2(pack(p.x, p.y), pack(p.z, p.w));
    }
    if (const long long i = vectors * 4 + thread; i < count) {
        adamw_one(master[i], __fmul_rn(gradient[i], scale), average[i], square[i], u, i < decayed);
        if (compute != nullptr) compute[i] = to_bf16(master[i]);
    }
}
