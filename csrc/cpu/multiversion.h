// One source, several instruction sets: the compiler vectorises a plain loop for each, and the
// loader picks the best the processor has. Elsewhere the compiler's baseline is fine (NEON on ARM).
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MAS_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MAS_MULTIVERSION
#endif

// What such a function calls has to be inlined into it to be compiled for the same instructions.
#if defined(__GNUC__)
#define MAS_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define MAS_ALWAYS_INLINE inline
#endif
