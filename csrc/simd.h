// Packs of N numbers, in as many vector registers as the instruction set needs. GNU vector extensions, no intrinsics.
//
// Included by the kernels only, which are compiled once for each instruction set, each time in a namespace of its own
// (LEVEL), so that no two of them are ever merged by the linker.
#pragma once

#include <cstdint>
#include <utility>

#define INLINE inline __attribute__((always_inline))

namespace crystalformer::LEVEL {

#if defined(__AVX512F__)
constexpr int REGISTER_BYTES = 64;
#elif defined(__AVX2__)
constexpr int REGISTER_BYTES = 32;
#else
constexpr int REGISTER_BYTES = 16;
#endif

template <class T>
struct Float;
template <>
struct Float<float> {
    using Int = int32_t;
    static constexpr int MANTISSA = 23;
};
template <>
struct Float<double> {
    using Int = int64_t;
    static constexpr int MANTISSA = 52;
};

template <class T, int N>
struct Pack {
    static constexpr int BYTES = N * int(sizeof(T)) < REGISTER_BYTES ? N * int(sizeof(T)) : REGISTER_BYTES;
    static constexpr int LANES = BYTES / int(sizeof(T));
    static constexpr int PARTS = N / LANES;
    typedef T Vector __attribute__((vector_size(BYTES)));
    typedef typename Float<T>::Int Bits __attribute__((vector_size(BYTES)));

    Vector part[PARTS];

    static INLINE Pack all(T x) {
        Pack r;
        for (int i = 0; i < PARTS; ++i) r.part[i] = Vector{} + x;
        return r;
    }
    static INLINE Pack load(const T* from) {
        Pack r;
        for (int i = 0; i < PARTS; ++i) __builtin_memcpy(&r.part[i], from + i * LANES, BYTES);
        return r;
    }
    INLINE void store(T* to) const {
        for (int i = 0; i < PARTS; ++i) __builtin_memcpy(to + i * LANES, &part[i], BYTES);
    }
    INLINE T sum() const {
        Vector s = part[0];
        for (int i = 1; i < PARTS; ++i) s += part[i];
        T lanes[LANES], total = 0;
        __builtin_memcpy(lanes, &s, sizeof s);
        for (int width = LANES / 2; width; width /= 2)
            for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
        total = lanes[0];
        return total;
    }
};

#define PACK_OPERATOR(op)                                                               \
    template <class T, int N>                                                           \
    INLINE Pack<T, N> operator op(Pack<T, N> a, Pack<T, N> b) {                         \
        for (int i = 0; i < Pack<T, N>::PARTS; ++i) a.part[i] = a.part[i] op b.part[i]; \
        return a;                                                                       \
    }                                                                                   \
    template <class T, int N>                                                           \
    INLINE Pack<T, N> operator op(Pack<T, N> a, T b) {                                  \
        for (int i = 0; i < Pack<T, N>::PARTS; ++i) a.part[i] = a.part[i] op b;         \
        return a;                                                                       \
    }                                                                                   \
    template <class T, int N, class B>                                                  \
    INLINE Pack<T, N>& operator op## = (Pack<T, N> & a, B b) {                          \
        return a = a op b;                                                              \
    }
PACK_OPERATOR(+)
PACK_OPERATOR(-)
PACK_OPERATOR(*)
PACK_OPERATOR(/)
#undef PACK_OPERATOR

// NaN where one of the two is.
template <class T, int N>
INLINE Pack<T, N> max(Pack<T, N> a, Pack<T, N> b) {
    for (int i = 0; i < Pack<T, N>::PARTS; ++i) {
        const auto larger = a.part[i] > b.part[i] ? a.part[i] : b.part[i];  // b where one is NaN
        a.part[i] = a.part[i] == a.part[i] ? larger : a.part[i];
    }
    return a;
}

// Some lanes of a register, from `from` on.
template <int from, class Vector, int... lane>
INLINE auto lanes(Vector x, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(x, x, (from + lane)...);
}

// One half: which = 0 or 1.
template <int which, class T, int N>
INLINE Pack<T, N / 2> half(Pack<T, N> x) {
    Pack<T, N / 2> r;
    if constexpr (Pack<T, N>::PARTS > 1)
        for (int i = 0; i < r.PARTS; ++i) r.part[i] = x.part[i + which * r.PARTS];
    else
        r.part[0] = lanes<which * N / 2>(x.part[0], std::make_integer_sequence<int, N / 2>());
    return r;
}

// The sum of the two halves.
template <class T, int N>
INLINE Pack<T, N / 2> fold(Pack<T, N> x) {
    return half<0>(x) + half<1>(x);
}

// The largest number; NaN if one of them is.
template <class T, int N>
INLINE T largest(Pack<T, N> x) {
    if constexpr (N == 1)
        return x.part[0][0];
    else
        return largest(max(half<0>(x), half<1>(x)));
}

// a0 b0 a1 b1 ... of the lower halves of two registers (from = 0) or the upper ones (from = LANES / 2).
template <int from, class Vector, int... lane>
INLINE Vector interleave(Vector a, Vector b, std::integer_sequence<int, lane...>) {
    return __builtin_shufflevector(a, b, ((lane % 2 ? int(sizeof...(lane)) : 0) + from + lane / 2)...);
}

// Rows become columns.
template <class T, int N>
INLINE void transpose(Pack<T, N> (&rows)[N]) {
    using P = Pack<T, N>;
    using Lanes = std::make_integer_sequence<int, P::LANES>;
    for (int step = 1; step < N; step *= 2) {
        P next[N];
        for (int r = 0; r < N / 2; ++r)
            for (int i = 0; i < P::PARTS; ++i) {
                const auto a = rows[r].part[i], b = rows[r + N / 2].part[i];
                const int to = 2 * r * P::PARTS + 2 * i;
                next[to / P::PARTS].part[to % P::PARTS] = interleave<0>(a, b, Lanes());
                next[(to + 1) / P::PARTS].part[(to + 1) % P::PARTS] = interleave<P::LANES / 2>(a, b, Lanes());
            }
        for (int r = 0; r < N; ++r) rows[r] = next[r];
    }
}

// 2^x, NaN for NaN, and exactly 0 for x <= lowest: products of what is left stay clear of denormal numbers, which are
// slow.
template <class T, int N>
INLINE Pack<T, N> exp2_above(Pack<T, N> x, T lowest) {
    using P = Pack<T, N>;
    // Adding and subtracting 1.5 * 2^MANTISSA rounds to an integer, which then sits in the low bits of the sum.
    constexpr T SHIFTER = T(3) * T(int64_t(1) << (Float<T>::MANTISSA - 1));
    for (int i = 0; i < P::PARTS; ++i) {
        const typename P::Vector v = x.part[i], rounded = v + SHIFTER, f = v - (rounded - SHIFTER);
        typename P::Vector p;
        if constexpr (sizeof(T) == 4) {  // minimax on [-1/2, 1/2], relative error 1e-8
            p = f * T(1.535336188319500e-4) + T(1.339887440266574e-3);
            p = p * f + T(9.618437357674640e-3);
            p = p * f + T(5.550332471162809e-2);
            p = p * f + T(2.402264791363012e-1);
            p = p * f + T(6.931472028550421e-1);
        } else {  // Taylor, relative error 1e-17
            p = f * T(1.3691488853904124e-12) + T(2.5678435993488202e-11);
            p = p * f + T(4.4455382718708116e-10);
            p = p * f + T(7.0549116208011233e-9);
            p = p * f + T(1.0178086009239699e-7);
            p = p * f + T(1.3215486790144309e-6);
            p = p * f + T(1.5252733804059841e-5);
            p = p * f + T(1.5403530393381608e-4);
            p = p * f + T(1.3333558146428443e-3);
            p = p * f + T(9.6181291076284772e-3);
            p = p * f + T(5.5504108664821580e-2);
            p = p * f + T(2.4022650695910072e-1);
            p = p * f + T(6.9314718055994531e-1);
        }
        p = p * f + T(1);
        const typename P::Bits scaled = (typename P::Bits)p + ((typename P::Bits)rounded << Float<T>::MANTISSA);
        x.part[i] = v <= lowest ? typename P::Vector{} : (typename P::Vector)scaled;
    }
    return x;
}

}  // namespace crystalformer::LEVEL
