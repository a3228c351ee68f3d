"""CPU kernels in C with clang's vector extensions, for AVX-512, AVX2 and, four lanes wide, NEON.

build.py     compiles them on first use and loads them; threads.py runs them
vec.h        vectors
"""
