// The kernels for x86-64-v4: AVX-512.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "kernels.h"
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma,bmi,bmi2,lzcnt,popcnt,prefer-vector-width=512")
#define LEVEL v4
#include "kernels.inc"
#endif
