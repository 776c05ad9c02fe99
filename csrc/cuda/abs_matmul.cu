// accumulate_abs_matmul_ on CUDA: Ω[p,d] += scale·Σ_b |Σ_t left[b,t,p]·right[b,t,d]|.
#include "abs_matmul.cuh"
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

template <class T, class Magnitude>
void launch_tiles(const AbsMatmul& call, const Tensor& omega, cudaStream_t stream) {
  const int64_t size = call.rows * call.columns;
  const int count = parts_of(call);
  const auto blocks = static_cast<unsigned>(tiles_of(call) * count);
  if (count == 1) {
    abs_matmul_kernel<T, Magnitude>
        <<<blocks, TileFor<T, Magnitude>::kThreads, 0, stream>>>(call, {1, nullptr});
    return;
  }
  const Tensor sums = torch::stable::new_empty(omega, {count * size});
  const Parts parts{count, sums.mutable_data_ptr()};
  abs_matmul_kernel<T, Magnitude>
      <<<blocks, TileFor<T, Magnitude>::kThreads, 0, stream>>>(call, parts);
  const auto rest = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  add_parts<accumulate_t<T>><<<rest, kThreads, 0, stream>>>(call, parts);
}

struct Kernels : CudaKernels {
  template <class Magnitude>
  static void accumulate_abs_matmul(Magnitude, const Call& call, const AbsMatmul& problem) {
    const torch::stable::accelerator::DeviceGuard guard(call.home.get_device_index());
    visit_dtype(problem.dtype, [&]<class T>() {
      launch_tiles<T, Magnitude>(problem, call.home, current_stream(call.home));
    });
    check_launch(call.op);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("accumulate_abs_matmul_", TORCH_BOX(&accumulate_abs_matmul_<Kernels>));
}

}  // namespace mas_ext::cuda
