// accumulate_importance_ on CUDA: Ω += scale·|g| or scale·g², 12 bytes per float32 parameter.
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

template <template <class> class Operation>
void run(const Call& call, const FlatList<2>& list, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(call.place.device_index);
  launch<Operation>(call, list, nullptr, current_stream(call.place),
                    [&]<class T>() { return Operation<T>{static_cast<accumulate_t<T>>(scale)}; });
}

struct Kernels : CudaKernels {
  static void accumulate(MagnitudeAbs, const Call& call, const FlatList<2>& list, double scale) {
    run<AccumulateImportance>(call, list, scale);
  }
  static void accumulate(MagnitudeSquare, const Call& call, const FlatList<2>& list, double scale) {
    run<AccumulateSquare>(call, list, scale);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  implement_with_packed_lists<&accumulate_importance_<Kernels>>(m, "accumulate_importance_");
}

}  // namespace mas_ext::cuda
