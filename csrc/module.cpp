// mas_ext._C: what was compiled, what this processor can run, and lists of tensors as kernels read
// them. The operators are in mas_ext/_kernels, which does not depend on the Python version.
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <string>

#include "packed_tensor.h"

#ifndef MAS_EXT_CUDA_ARCHS
#define MAS_EXT_CUDA_ARCHS ""
#endif

#define MAS_STRING_(x) #x
#define MAS_STRING(x) MAS_STRING_(x)

namespace {

using mas_ext::PackedTensor;
using torch::headeronly::ScalarType;

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

// How PyTorch describes a tensor without a call into Python, and the types that hide nothing from
// it: a subclass may.
struct Exchange {
  DLPackDLTensorFromPyObjectNoSync describe = nullptr;
  pybind11::object tensor, parameter;

  bool knows(PyObject* object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor.ptr() || type == parameter.ptr();
  }
};

// Without `describe` if this PyTorch has no such interface, or a later one.
Exchange find_exchange() {
  const auto torch = pybind11::module_::import("torch");
  const pybind11::object tensor = torch.attr("Tensor");
  if (!pybind11::hasattr(tensor, "__dlpack_c_exchange_api__")) {
    return {};
  }
  const pybind11::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* api = capsule.get_pointer<DLPackExchangeAPI>();
  if (api->header.version.major != DLPACK_MAJOR_VERSION) {
    return {};
  }
  return {api->dltensor_from_py_object_no_sync, tensor, torch.attr("nn").attr("Parameter")};
}

// Undefined for what no kernel takes.
ScalarType dtype_of(const DLDataType& dtype) {
  const auto is = [&](uint8_t code, uint8_t bits) {
    return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
  };
  return is(kDLFloat, 32)    ? ScalarType::Float
         : is(kDLBfloat, 16) ? ScalarType::BFloat16
         : is(kDLFloat, 16)  ? ScalarType::Half
         : is(kDLFloat, 64)  ? ScalarType::Double
         : is(kDLUInt, 8)    ? ScalarType::Byte
                             : ScalarType::Undefined;
}

// A tensor may hold the negative of its values: the imaginary part of a conjugate does, and steps
// over the real parts. So one with neighbours in memory does not.
bool may_be_negated(const DLTensor& tensor) {
  for (int32_t d = 0; d < tensor.ndim; ++d) {
    if (tensor.shape[d] > 1 && tensor.strides[d] == 1) {
      return false;
    }
  }
  return true;
}

// Whether a tensor is described by its memory alone; if so, writes the description.
bool describe(const Exchange& exchange, PyObject* object, PackedTensor& packed) {
  DLTensor tensor;
  if (!exchange.knows(object)) {
    return false;
  }
  if (exchange.describe(object, &tensor) != 0) {  // it is sparse, for example
    PyErr_Clear();
    return false;
  }
  const bool is_cpu = tensor.device.device_type == kDLCPU;
  packed = {static_cast<char*>(tensor.data) + tensor.byte_offset,
            tensor.shape,
            tensor.strides,
            tensor.ndim,
            tensor.device.device_id,
            is_cpu,
            dtype_of(tensor.dtype)};
  return packed.dtype != ScalarType::Undefined &&
         (is_cpu || tensor.device.device_type == kDLCUDA) &&
         !(may_be_negated(tensor) && pybind11::handle(object).attr("is_neg")().cast<bool>());
}

// The bytes of one list that packed.h reads, or None.
pybind11::object pack(const pybind11::list& tensors) {
  static const auto* exchange = new Exchange(find_exchange());  // outlives the interpreter
  if (exchange->describe == nullptr) {
    return pybind11::none();
  }
  const auto length = static_cast<int64_t>(tensors.size());
  const size_t size = sizeof(length) + tensors.size() * sizeof(PackedTensor);
  const auto bytes = pybind11::reinterpret_steal<pybind11::object>(
      PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
  char* begin = PyByteArray_AsString(bytes.ptr());
  std::memcpy(begin, &length, sizeof(length));
  auto* next = reinterpret_cast<PackedTensor*>(begin + sizeof(length));
  for (const pybind11::handle tensor : tensors) {
    if (!describe(*exchange, tensor.ptr(), *next++)) {
      return pybind11::none();
    }
  }
  return bytes;
}

// See mas_ext/_operators/native.py, which has the same in Python.
bool are_as_before(const pybind11::list& entries, const pybind11::list& sizes) {
  for (const pybind11::handle entry : entries) {
    const auto part = [&](Py_ssize_t i) { return PyTuple_GetItem(entry.ptr(), i); };
    if (PyDict_GetItem(part(0), part(1)) != part(2)) {
      return false;
    }
  }
  for (const pybind11::handle size : sizes) {
    if (PyDict_Size(PyTuple_GetItem(size.ptr(), 0)) !=
        PyLong_AsSsize_t(PyTuple_GetItem(size.ptr(), 1))) {
      return false;
    }
  }
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build configuration of mas_ext, the features of this processor, and packed lists.";
  m.def("build_config", &build_config, "What the native library was compiled with.");
  m.def("pack", &pack, "A list of tensors as bytes that hold during one call, or None.");
  m.def("are_as_before", &are_as_before, "Whether entries of dictionaries are as they were.");
  m.def("simd_level", &simd_level, "The instruction set that the CPU kernels use here.");
}
