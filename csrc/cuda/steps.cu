// Optimizer steps that include the penalty, on CUDA: sgd_step_ and adamw_step_. One pass: 20 bytes
// per float32 parameter for SGD, 28 with momentum, 36 for AdamW.
#include "launch.cuh"

namespace mas_ext::cuda {
namespace {

// One per parameter, on the device.
struct DeviceCorrections {
  Tensor tensor;
  const BiasCorrection* data() const {
    return static_cast<const BiasCorrection*>(tensor.const_data_ptr());
  }
};

struct Kernels : CudaKernels {
  // Nothing waits for the counts.
  static DeviceCorrections bias_corrections(const char* op, const Tensor& steps,
                                            const AdamOptions& options) {
    static_assert(sizeof(BiasCorrection) == 2 * sizeof(double));
    const int64_t count = steps.numel();
    const Tensor corrections = torch::stable::new_empty(steps, {count, 2}, ScalarType::Double);
    if (count == 0) {
      return {corrections};
    }
    const torch::stable::accelerator::DeviceGuard guard(steps.get_device_index());
    const Tensor counts = torch::stable::contiguous(steps);
    const auto blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    const auto run = [&]<class Count>() {
      cuda::bias_corrections<<<blocks, kThreads, 0, current_stream(Place(steps))>>>(
          static_cast<const Count*>(counts.const_data_ptr()), count, options,
          static_cast<BiasCorrection*>(corrections.mutable_data_ptr()));
    };
    dtype_of(counts) == ScalarType::Double ? run.template operator()<double>()
                                           : run.template operator()<float>();
    check_launch(op);
    return {corrections};
  }

  template <template <class> class Rule, bool Proximal, size_t Streams, class Options>
  static Tensor step(const Call& call, const FlatList<Streams>& list, const DeviceScalars& scalars,
                     const Options& options, const BiasCorrection* corrections) {
    using By = StepBy<Rule, Options, Proximal>;
    return launch_penalty<By::template Operation>(call, list, scalars.lambda, [&]<class T>() {
      return typename By::template Operation<T>(scalars, options, corrections);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mas_ext, CUDA, m) {
  implement_with_packed_lists<&sgd_step_<Kernels>>(m, "sgd_step_");
  implement_with_packed_lists<&adamw_step_<Kernels>>(m, "adamw_step_");
}

}  // namespace mas_ext::cuda
