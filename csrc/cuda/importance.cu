// accumulate_importance_ on CUDA: Ω += scale·|g|, 12 bytes a float32 parameter.
#include <torch/csrc/stable/library.h>

#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

void accumulate_importance_(const TensorList& omega, const TensorList& grads, double scale) {
  constexpr const char* op = "accumulate_importance_";
  mas_ext::check_non_negative(op, "scale", scale);
  FlatList<2> list(op, {{.name = "omega", .tensors = omega, .is_omega = true, .writable = true},
                        {.name = "grads", .tensors = grads}});
  const torch::stable::accelerator::DeviceGuard guard(omega.front().get_device_index());
  launch<AccumulateImportance>(op, list, nullptr, current_stream(omega.front()), [&]<class T>() {
    return AccumulateImportance<T>{static_cast<accumulate_t<T>>(scale)};
  });
  list.write_back();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("accumulate_importance_", TORCH_BOX(&accumulate_importance_));
}

}  // namespace mas_ext::cuda
