// The penalty λ/2 Σ Ω(θ−θ*)² on CUDA: its value alone, with its gradient, and with the gradient
// added to what is there. Each is one pass: 12, 16 and 20 bytes per float32 parameter.
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

struct Kernels : CudaKernels {
  static Tensor penalty(const Call& call, const FlatList<3>& list, const Scalar& lambda) {
    return launch_penalty<PenaltyEnergy>(call, list, lambda,
                                         [&]<class T>() { return PenaltyEnergy<T>{}; });
  }

  template <bool Add>
  static Tensor penalty_gradient(const Call& call, const FlatList<4>& list, const Scalar& lambda,
                                 const Scalar& grad_scale) {
    if constexpr (Add) {
      return launch_penalty<AddPenaltyGradient>(call, list, lambda, [&]<class T>() {
        return AddPenaltyGradient<T>{lambda, grad_scale, 0};
      });
    } else {
      return launch_penalty<PenaltyGradient>(
          call, list, lambda, [&]<class T>() { return PenaltyGradient<T>{lambda, grad_scale, 0}; });
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("penalty", TORCH_BOX(&FromLists<&penalty<Kernels>>::call));
  m.impl("penalty_and_grad", TORCH_BOX(&FromLists<&penalty_and_grad<Kernels>>::call));
  implement_with_packed_lists<&add_penalty_grad_<Kernels>>(m, "add_penalty_grad_");
}

}  // namespace mas_ext::cuda
