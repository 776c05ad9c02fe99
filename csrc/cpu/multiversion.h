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

// Whether the loader picks the AVX-512 version, whose registers are 64 bytes, and 32 of them.
inline bool has_wide_registers() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f");
#else
  return false;
#endif
}

}  // namespace mas_ext::cpu
