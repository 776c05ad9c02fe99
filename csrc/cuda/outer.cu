// accumulate_outer_ on CUDA: Ω[p,d] += scale·Σ_b f(Σ_t left[b,t,p]·right[b,t,d]), where f(x) is |x|
// or x².
#include "launch.cuh"
#include "outer.cuh"

namespace mas_ext::cuda {
namespace {

template <class T, class Magnitude>
void launch_tiles(Outer problem, const Place& place, cudaStream_t stream) {
  turn_samples_where_exact<T, Magnitude>(problem);
  const int64_t size = problem.rows * problem.columns;
  const int count = parts_of(problem);
  const auto blocks = static_cast<unsigned>(tiles_of(problem) * count);
  if (count == 1) {
    outer_kernel<T, Magnitude><<<blocks, TileFor<T>::kThreads, 0, stream>>>(problem, {1, nullptr});
    return;
  }
  const Tensor sums = place.empty({count * size}, accumulate_dtype(problem.dtype));
  const Parts parts{count, sums.mutable_data_ptr()};
  outer_kernel<T, Magnitude><<<blocks, TileFor<T>::kThreads, 0, stream>>>(problem, parts);
  const auto rest = static_cast<unsigned>((size + kThreads - 1) / kThreads);
  add_parts<accumulate_t<T>><<<rest, kThreads, 0, stream>>>(problem, parts);
}

struct Kernels : CudaKernels {
  template <class Magnitude>
  static void accumulate_outer(Magnitude, const Call& call, const Outer& problem) {
    if (problem.has_offsets()) {
      fail(call.op,
           "positions or columns are several dimensions that do not lie at one stride in memory, "
           "which only the CPU's kernels take; reshape() them to one dimension each");
    }
    const torch::stable::accelerator::DeviceGuard guard(call.place.device_index);
    visit_dtype(problem.dtype, [&]<class T>() {
      launch_tiles<T, Magnitude>(problem, call.place, current_stream(call.place));
    });
    check_launch(call.op);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  m.impl("accumulate_outer_", TORCH_BOX(&accumulate_outer_<Kernels>));
}

}  // namespace mas_ext::cuda
