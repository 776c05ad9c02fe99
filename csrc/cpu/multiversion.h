// One source, several instruction sets: the compiler vectorises a plain loop for each, and the
// loader picks the best the processor has. Elsewhere the compiler's baseline is fine (NEON on ARM).
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
#define MAS_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
// For loops of a·b + c alone: "avx2" does not bring the fused instruction, "fma" does (and AVX).
#define MAS_MULTIVERSION_FMA __attribute__((target_clones("avx512f", "fma", "default")))
#else
#define MAS_MULTIVERSION
#define MAS_MULTIVERSION_FMA
#endif

// What such a function calls has to be inlined into it to be compiled for the same instructions.
#if defined(__GNUC__)
#define MAS_ALWAYS_INLINE inline __attribute__((always_inline))
#else
#define MAS_ALWAYS_INLINE inline
#endif

namespace mas_ext::cpu {

// Asks for the cache line at an address, and for where its page lies.
MAS_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// The registers of what the loader picks for MAS_MULTIVERSION_FMA. For code that names vectors of a
// size: the compiler splits those that are too long for the instructions at hand, but badly.
inline int register_bytes() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f") ? 64 : __builtin_cpu_supports("fma") ? 32 : 16;
#else
  return 16;
#endif
}

}  // namespace mas_ext::cpu
