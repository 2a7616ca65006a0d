// Fingerprints of flat buffers.
#include "bits.cuh"

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
