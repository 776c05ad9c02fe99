// low_rank_penalty on CUDA: λ/2 Σ Ω∘Δ² with Δ = scale·B·A, and its gradients to A and B.
#include "launch.cuh"
#include "low_rank.cuh"

namespace mas_ext::cuda {
namespace {

unsigned blocks_for(const LowRank& problem, int parts) {
  return static_cast<unsigned>(column_tiles(problem) * parts * rank_tiles(problem));
}

// The gradient to the right factor, if it is asked for.
template <class A>
void launch_tiles(const Call& call, const LowRank& problem, const Scalar& lambda, double* energies,
                  cudaStream_t stream) {
  const int count = parts_of(problem);
  const int64_t size = problem.has_grads() ? problem.rank * problem.columns : 0;
  const Tensor sums = call.place.empty({count * size}, accumulate_dtype(problem.dtype));
  const LowRankParts parts{count, sums.mutable_data_ptr()};
  low_rank_kernel<A><<<blocks_for(problem, count), kThreads, 0, stream>>>(problem, parts, energies);
  check_launch(call.op);
  if (size > 0) {
    const auto blocks = static_cast<unsigned>(divide_up(size, kThreads));
    add_low_rank<A><<<blocks, kThreads, 0, stream>>>(problem, parts, lambda);
    check_launch(call.op);
  }
}

template <class A>
void run(const Call& call, LowRank problem, const Scalar& lambda, double* energies,
         cudaStream_t stream) {
  launch_tiles<A>(call, problem, lambda, energies, stream);
  if (problem.has_grads()) {
    transpose(problem);
    launch_tiles<A>(call, problem, lambda, nullptr, stream);
  }
}

struct Kernels : CudaKernels {
  static Tensor low_rank_penalty(const Call& call, const LowRank& problem, const Scalar& lambda) {
    const torch::stable::accelerator::DeviceGuard guard(call.place.device_index);
    const cudaStream_t stream = current_stream(call.place);
    const int64_t count = problem.is_empty() ? 0 : column_tiles(problem) * parts_of(problem);
    const Tensor partial = call.place.empty({count}, ScalarType::Double);
    const Tensor value = call.place.empty({}, accumulate_dtype(problem.dtype));
    auto* energies = static_cast<double*>(partial.mutable_data_ptr());
    visit_dtype(dtype_of(value), [&]<class A>() {
      if constexpr (sizeof(A) >= sizeof(float)) {
        if (count > 0) {
          run<A>(call, problem, lambda, energies, stream);
        }
        finish_penalty<A><<<1, kThreads, 0, stream>>>(energies, count, lambda,
                                                      static_cast<A*>(value.mutable_data_ptr()));
      }
    });
    check_launch(call.op);
    return value;
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("low_rank_penalty", TORCH_BOX(&low_rank_penalty<Kernels>));
  m.impl("low_rank_penalty_grad_", TORCH_BOX(&low_rank_penalty_grad_<Kernels>));
}

}  // namespace mas_ext::cuda
