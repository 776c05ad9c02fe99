// One source for several instruction sets: the compiler vectorises a plain loop for each, and the
// loader picks the best that the processor has. Elsewhere the baseline is enough (NEON on ARM).
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MAS_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
// For loops of a·b + c: "avx2" does not enable the fused instruction; "fma" does, and AVX with it.
#define MAS_MULTIVERSION_FMA __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define MAS_MULTIVERSION
#define MAS_MULTIVERSION_FMA
#endif

// Functions called by such a function must be inlined to be compiled for the same instructions.
#if defined(__GNUC__)
#define MAS_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define MAS_ALWAYS_INLINE inline
#endif

namespace mas_ext::cpu {

// Prefetches the cache line at an address, and the translation of its page.
MAS_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// The register size of the version that the loader picks for MAS_MULTIVERSION_FMA, for code that
// uses vectors of a given size. The compiler splits longer vectors, but badly.
inline int register_bytes() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f") ? 64 : __builtin_cpu_supports("fma") ? 32 : 16;
#else
  return 16;
#endif
}

}  // namespace mas_ext::cpu
