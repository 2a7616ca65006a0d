// What all kernels share: vectors of eight bf16 numbers, and sums over a block whose order never changes.
//
// Tensors are bf16 in memory and fp32 in registers. Pointers to vectors are 16-byte aligned and widths multiples of 8;
// the launching side has checked both.
#pragma once

// The bits of a bf16 number: the upper half of an fp32 one.
using bf16 = unsigned short;

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int VECTOR = 8;

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fc00000u); }

__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<unsigned>(x) << 16); }

// Two numbers, rounded to nearest even, the first one in the lower half.
__device__ __forceinline__ unsigned pack(float low, float high) {
    unsigned packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ bf16 to_bf16(float x) { return static_cast<bf16>(pack(x, 0.0f)); }

__device__ __forceinline__ float round_to_bf16(float x) { return __uint_as_float(pack(x, 0.0f) << 16); }

__device__ __forceinline__ uint4 load(const bf16 *at) { return *reinterpret_cast<const uint4 *>(at); }

__device__ __forceinline__ void store(bf16 *at, uint4 packed) { *reinterpret_cast<uint4 *>(at) = packed; }

__device__ __forceinline__ void unpack(uint4 packed, float (&x)[VECTOR]) {
    const unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ uint4 pack(const float (&x)[VECTOR]) {
    return make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}

// Eight consecutive fp32 numbers.
__device__ __forceinline__ void load(const float *at, float (&x)[VECTOR]) {
    const float4 first = reinterpret_cast<const float4 *>(at)[0], second = reinterpret_cast<const float4 *>(at)[1];
    x[0] = first.x, x[1] = first.y, x[2] = first.z, x[3] = first.w;
    x[4] = second.x, x[5] = second.y, x[6] = second.z, x[7] = second.w;
}

__device__ __forceinline__ void store(float *at, const float (&x)[VECTOR]) {
    reinterpret_cast<float4 *>(at)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4 *>(at)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// The sum over a warp, in every lane.
template <typename Number>
__device__ __forceinline__ Number warp_sum(Number x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// The sum over a block of whole warps, in every thread. All threads of the block call it.
template <typename Number>
__device__ __forceinline__ Number block_sum(Number x) {
    __shared__ Number warps[32];
    x = warp_sum(x);
    __syncthreads();  // whoever still reads the sums of the call before is done
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    Number total = 0;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += warps[warp];
    return total;
}
