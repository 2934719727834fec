// The kernels for x86-64-v3: AVX2 and fused multiply-add.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include "kernels.h"
#pragma GCC target("avx2,fma,bmi,bmi2,lzcnt,popcnt")
#define LEVEL v3
#include "kernels.inc"
#endif
