// What is done with the bits of numbers: masters beside bf16 parameters, random rounding, and the numbers behind it.
#pragma once
#include "common.cuh"

// N numbers that lie together and are moved at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T x[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> read(const T *at) {
    return *reinterpret_cast<const Pack<T, N> *>(at);
}

template <typename T, int N>
__device__ __forceinline__ void write(T *at, const Pack<T, N> &pack) {
    *reinterpret_cast<Pack<T, N> *>(at) = pack;
}

// The number at `index` in the sequence of `key`: SplitMix64, as `kernels/mix.rs` has it.
__device__ __forceinline__ unsigned long long number(unsigned long long key, unsigned long long index) {
    unsigned long long x = key + index * 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

// The bits of a number. Any NaN is made the quiet one: of another, what is left of the upper half could be an infinity.
__device__ __forceinline__ unsigned bits_of(float x) { return x != x ? 0x7fc00000u : __float_as_uint(x); }

__device__ __forceinline__ float join(bf16 param, short remainder) {
    return __uint_as_float((static_cast<unsigned>(param) << 16) + static_cast<unsigned>(static_cast<int>(remainder)));
}

__device__ __forceinline__ void split(float master, bf16 &param, short &remainder) {
    const unsigned bits = bits_of(master);
    param = static_cast<bf16>((bits + 0x8000u) >> 16);
    remainder = static_cast<short>(bits);
}

// Up if the noise of 16 bits carries over the lower half.
__device__ __forceinline__ bf16 round_at_random(float x, unsigned noise) {
    return static_cast<bf16>((bits_of(x) + noise) >> 16);
}

// `work.at<N>(i)` for the N numbers from i on, and so for all of `count`; the last ones, fewer than N, one by one.
template <int N, typename Work>
__device__ __forceinline__ void sweep(long long count, Work &work) {
    const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    const long long packs = count / N;
    for (long long i = thread; i < packs; i += stride) work.template at<N>(i * N);
    if (const long long i = packs * N + thread; i < count) work.template at<1>(i);
}
