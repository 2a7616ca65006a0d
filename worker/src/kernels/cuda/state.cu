// Masters to halves and back, and fingerprints of flat buffers.
#include "bits.cuh"

struct Split {
    const float *master;
    bf16 *param;
    short *remainder;

    template <int N>
    __device__ void at(long long i) const {
        const Pack<float, N> whole = read<N>(master + i);
        Pack<bf16, N> upper;
        Pack<short, N> lower;
#pragma unroll
        for (int n = 0; n < N; ++n) split(whole.x[n], upper.x[n], lower.x[n]);
        write(param + i, upper);
        write(remainder + i, lower);
    }
};

struct Join {
    const bf16 *param;
    const short *remainder;
    float *master;

    template <int N>
    __device__ void at(long long i) const {
        const Pack<bf16, N> upper = read<N>(param + i);
        const Pack<short, N> lower = read<N>(remainder + i);
        Pack<float, N> whole;
#pragma unroll
        for (int n = 0; n < N; ++n) whole.x[n] = join(upper.x[n], lower.x[n]);
        write(master + i, whole);
    }
};

constexpr int LANES = 4;

// Of unsigned numbers, whose values are the bits in question.
template <typename Bits>
struct Fingerprint {
    const Bits *x;
    unsigned long long first, keys[LANES], sums[LANES];

    template <int N>
    __device__ void at(long long i) {
        const Pack<Bits, N> bits = read<N>(x + i);
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) sums[lane] += number(keys[lane] + bits.x[n], first + i + n);
    }
};

// Adds to `sums` [LANES]. Sums of integers do not depend on who comes first.
template <typename Bits>
__device__ __forceinline__ void add_fingerprint(Fingerprint<Bits> work, unsigned long long *sums, long long count) {
    sweep<4>(count, work);
    for (int lane = 0; lane < LANES; ++lane) {
        const unsigned long long sum = block_sum(work.sums[lane]);
        if (threadIdx.x == 0) atomicAdd(sums + lane, sum);
    }
}

#define ENTRY extern "C" __global__ void __launch_bounds__(256)

ENTRY split_masters(const float *master, bf16 *param, short *remainder, long long count) {
    Split work = {master, param, remainder};
    sweep<4>(count, work);
}

ENTRY join_masters(const bf16 *param, const short *remainder, float *master, long long count) {
    Join work = {param, remainder, master};
    sweep<4>(count, work);
}

ENTRY fingerprint_words(const unsigned *x, unsigned long long *sums, long long count, unsigned long long first,
                        unsigned long long key0, unsigned long long key1, unsigned long long key2,
                        unsigned long long key3) {
    add_fingerprint<unsigned>({x, first, {key0, key1, key2, key3}, {}}, sums, count);
}

ENTRY fingerprint_halves(const unsigned short *x, unsigned long long *sums, long long count, unsigned long long first,
                         unsigned long long key0, unsigned long long key1, unsigned long long key2,
                         unsigned long long key3) {
    add_fingerprint<unsigned short>({x, first, {key0, key1, key2, key3}, {}}, sums, count);
}
