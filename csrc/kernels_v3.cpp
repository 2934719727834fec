// The kernels for x86-64-v3, AVX2 and fused multiply-add: setup.py compiles this file with -march=x86-64-v3.
#define LEVEL v3
#include "kernels.inc"
