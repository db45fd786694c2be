// Keys and values as they travel (src/dtype.rs, Fp8): blocks of 32 elements of a row and head, a byte each, and behind them the scale bytes, 2^(byte − 127).
// Four threads share a block, eight elements each.
#pragma once
#include "params.h"
#include "ptx.cuh"

// The numbers of a format, as bits of the fp32 numbers that they are.
struct fp8_numbers {
    uint32_t shift;  // mantissa bits that fp32 has more
    uint32_t bias;   // what fp32's exponent bias is more
    uint32_t top;    // exponent of the largest number
    uint32_t last;   // largest mantissa, as fp32's, with which a number of that exponent still rounds to one of the format

    DEVICE explicit fp8_numbers(uint32_t type)
        : shift(type == CP_E4M3 ? 20 : 21), bias(type == CP_E4M3 ? 120 : 112), top(type == CP_E4M3 ? 8 : 15), last(type == CP_E4M3 ? 0x680000 : 0x6fffff) {}

    // x rounded to nearest even; it is not above what still rounds to the largest number.
    DEVICE uint32_t code(float x) const {
        uint32_t bits = __float_as_uint(x), sign = bits >> 24 & 0x80;
        bits &= 0x7fffffff;
        const uint32_t normal = ((bits + (1u << (shift - 1)) - 1 + (bits >> shift & 1)) >> shift) - (bias << (23 - shift));
        const uint32_t coarse = (bias + 1 + shift) << 23;  // its unit in the last place is the format's smallest step
        const uint32_t small = __float_as_uint(__uint_as_float(bits) + __uint_as_float(coarse)) - coarse;
        return sign | (bits < (bias + 1) << 23 ? small : normal);
    }
    // The number of a code that is not NaN.
    DEVICE float number(uint32_t code) const {
        const uint32_t bits = code & 0x7f, normal = (bits << shift) + (bias << 23);
        const float small = (float)bits * __uint_as_float((bias + 1 - (23 - shift)) << 23);
        return __uint_as_float((code & 0x80) << 24 | (bits < 1u << (23 - shift) ? __float_as_uint(small) : normal));
    }
    // The scale byte of a block, from the bits of its largest number without sign; 255 where that is no number or infinite.
    DEVICE uint32_t scale(uint32_t largest) const {
        if (largest >= 0x7f800000u) return 255;
        const uint32_t exponent = (largest + (0x7fffffu - last)) >> 23;
        return exponent > top ? exponent - top : 0;
    }
};

DEVICE float fp8_scale(uint32_t byte) { return __uint_as_float(byte == 0 ? 1u << 22 : byte == 255 ? 0x7fffffffu : byte << 23); }

// The largest of the four threads of a block.
DEVICE uint32_t fp8_largest(uint32_t x) {
    for (int other = 1; other <= 2; other *= 2) {
        const uint32_t y = __float_as_uint(shuffle_xor(__uint_as_float(x), other));
        x = x > y ? x : y;
    }
    return x;
}

// Eight bytes in words of W, of which the address is a multiple.
template <class W>
DEVICE void store_8(uint64_t at, uint64_t bytes) {
    for (uint32_t i = 0; i < 8 / sizeof(W); i++) store_global((W*)at + i, (W)(bytes >> 8 * sizeof(W) * i));
}
template <class W>
DEVICE uint64_t load_8(uint64_t at) {
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < 8 / sizeof(W); i++) bytes |= (uint64_t)load_global((const W*)at + i) << 8 * sizeof(W) * i;
    return bytes;
}
