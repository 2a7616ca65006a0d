// Cross-entropy of rows of logits, which become their own gradient. One block per row.
//
// With Z = logsumexp(x): loss = Z - x[target] + z_loss Z^2, dx = softmax(x) (1 + 2 z_loss Z) - onehot(target).
#include "common.cuh"

// The logsumexp of numbers seen so far, as their maximum and the sum of exp(x - maximum).
struct Mass {
    float maximum, sum;
};

__device__ __forceinline__ Mass join(Mass a, Mass b) {
    const float maximum = fmaxf(a.maximum, b.maximum);
    if (maximum == -infinity()) return {maximum, a.sum + b.sum};
    return {maximum, a.sum * __expf(a.maximum - maximum) + b.sum * __expf(b.maximum - maximum)};
}

template <int COUNT>
__device__ __forceinline__ Mass take(Mass mass, const float (&x)[COUNT]) {
    float maximum = mass.maximum;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) maximum = fmaxf(maximum, x[i]);
    // Nothing but -inf so far; a NaN has to show, so it is added.
    const float base = maximum == -infinity() ? 0.0f : maximum;
    float sum = mass.sum * __expf(mass.maximum - base);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum += __expf(x[i] - base);
    return {maximum, sum};
}

// In every thread. All threads of the block call it.
__device__ __forceinline__ Mass block_mass(Mass mass) {
    __shared__ Mass warps[32];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
        mass = join(mass, {__shfl_xor_sync(ALL_LANES, mass.maximum, distance),
                           __shfl_xor_sync(ALL_LANES, mass.sum, distance)});
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mass;
    __syncthreads();
    Mass total = warps[0];
    for (int warp = 1; warp < blockDim.x / 32; ++warp) total = join(total, warps[warp]);
    return total;
}

// A row: single numbers up to the first 16-byte boundary, vectors, single numbers after the last one.
struct Row {
    bf16 *x;
    int head, tail, width;  // vectors are those between `head` and `tail`
};

__device__ __forceinline__ Row row_of(bf16 *logits, int width) {
    const size_t begin = static_cast<size_t>(blockIdx.x) * width;
    const int head = min(static_cast<int>((VECTOR - begin % VECTOR) % VECTOR), width);
    return {logits + begin, head, head + (width - head) / VECTOR * VECTOR, width};
}

// The at most 14 single numbers of a row: the index of this thread's, or -1.
__device__ __forceinline__ int single(const Row &row) {
    const int i = threadIdx.x;
    if (i < row.head) return i;
    return i - row.head < row.width - row.tail ? row.tail + i - row.head : -1;
}

__device__ __forceinline__ Mass row_mass(const Row &row) {
    Mass mass = {-infinity(), 0.0f};
    if (const int i = single(row); i >= 0) mass = take(mass, {to_float(row.x[i])});
    for (int i = row.head + threadIdx.x * VECTOR; i < row.tail; i += blockDim.x * VECTOR) {
        float x[VECTOR];
        unpack(load(row.x + i), x);
        mass = take(mass, x);
    }
    return block_mass(mass);
}

__device__ __forceinline__ void clear(const Row &row) {
    if (const int i = single(row); i >= 0) row.x[i] = 0;
    for (int i = row.head + threadIdx.x * VECTOR; i < row.tail; i += blockDim.x * VECTOR) {
        store(row.x + i, make_uint4(0, 0, 0, 0));
    }
}

// `losses` [rows]: cross-entropy and whole objective of each row.
extern "C" __global__ void __launch_bounds__(512)
    cross_entropy(bf16 *logits, const long long *targets, const bool *mask, double2 *losses, int width, float z_loss) {
    const Row row = row_of(logits, width);
    if (!mask[blockIdx.x]) {
        clear(row);
        if (threadIdx.x == 0) losses[blockIdx.x] = make_double2(0.0, 0.0);
        return;
    }
    const long long target = targets[blockIdx.x];
    const Mass mass = row_mass(row);
    const float normalizer = mass.maximum + logf(mass.sum);
    if (threadIdx.x == 0) {
        // A target outside the vocabulary must not go unseen.
        const float chosen = target >= 0 && target < width ? to_float(row.x[target]) : not_a_number();
        const double loss = static_cast<double>(normalizer) - chosen;
        losses[blockIdx.x] =
            make_double2(loss, loss + static_cast<double>(z_loss) * normalizer * static_cast<double>(normalizer));
    }
    __syncthreads();  // the chosen logit is read
    const float slope = 1.0f + 2.0f * z_loss * normalizer;
    if (const int i = single(row); i >= 0) {
        row.x[i] = to_bf16(__expf(to_float(row.x[i]) - normalizer) * slope - (i == target ? 1.0f : 0.0f));
    }
    for (int i = row.head + threadIdx.x * VECTOR; i < row.tail; i += blockDim.x * VECTOR) {
        float x[VECTOR];
        unpack(load(row.x + i), x);
#pragma unroll
        for (int k = 0; k < VECTOR; ++k) {
            x[k] = __expf(x[k] - normalizer) * slope - (i + k == target ? 1.0f : 0.0f);
        }
        store(row.x + i, pack(x));
    }
}
