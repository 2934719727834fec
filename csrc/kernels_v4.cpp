// The kernels for x86-64-v4, AVX-512: setup.py compiles this file with -march=x86-64-v4.
#define LEVEL v4
#include "kernels.inc"
