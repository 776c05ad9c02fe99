// proximal_step_ on CUDA: θ ← (θ + ηλΩθ*)/(1 + ηλΩ), 16 bytes per float32 parameter.
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

struct Kernels : CudaKernels {
  static Tensor proximal_step(const Call& call, const FlatList<3>& list, const Scalar& lambda,
                              const Scalar& lr) {
    return launch_penalty<ProximalStep>(call, list, lambda,
                                        [&]<class T>() { return ProximalStep<T>{lambda, lr, 0}; });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  implement_with_packed_lists<&proximal_step_<Kernels>>(m, "proximal_step_");
}

}  // namespace mas_ext::cuda
