// mas_ext._C: what was compiled, and what this processor can run. The operators are in
// mas_ext/_kernels, which does not depend on the Python version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#ifndef MAS_EXT_CUDA_ARCHS
#define MAS_EXT_CUDA_ARCHS ""
#endif

#define MAS_STRING_(x) #x
#define MAS_STRING(x) MAS_STRING_(x)

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The version of the kernels that the loader picks here; see csrc/cpu/multiversion.h.
std::string simd_level() {
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f")) {
    return "avx512f";
  }
  if (__builtin_cpu_supports("avx2")) {
    return "avx2";
  }
  return "sse2";
#elif defined(__aarch64__)
  return "neon";
#else
  return "baseline";
#endif
}

pybind11::dict build_config() {
  pybind11::dict config;
  config["compiler"] = compiler();
  config["built_with_torch"] = MAS_STRING(MAS_EXT_TORCH_VERSION);
  config["minimum_torch"] = MAS_STRING(MAS_EXT_MINIMUM_TORCH);
  config["cuda_architectures"] = MAS_STRING(MAS_EXT_CUDA_ARCHS);
  return config;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build configuration of mas_ext and the features of this processor.";
  m.def("build_config", &build_config, "What the native library was compiled with.");
  m.def("simd_level", &simd_level, "The instruction set that the CPU kernels use here.");
}
