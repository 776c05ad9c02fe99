// Ω that is only read, as it is kept between tasks: bfloat16, or codes of 8 bits with a scale for
// every block of 256 (csrc/cuda/omega.cuh). Memory is walked by the code that multi_tensor.cpp has
// tested; what is new is how wide Ω's accesses are, and which scale is an element's.
#include <string>
#include <type_traits>
#include <vector>

#include "harness/list_cases.h"
#include "harness/steps.h"

namespace {

using namespace harness;

const std::vector<Kind> kNumbers{{ScalarType::Float, ScalarType::BFloat16},
                                 {ScalarType::BFloat16, ScalarType::BFloat16},
                                 {ScalarType::Half, ScalarType::BFloat16}};
const std::vector<Kind> kCodes{{ScalarType::Float, ScalarType::Byte},
                               {ScalarType::BFloat16, ScalarType::Byte},
                               {ScalarType::Half, ScalarType::Byte}};

// An operation by its kernels for codes, or for all that Ω can be kept in.
template <class Operation>
struct OfCodes : Operation {
  template <class T, class Kept>
  static constexpr bool runs = std::is_same_v<Kept, uint8_t>;
};
template <class Operation>
struct OfAny : Operation {
  template <class T, class Kept>
  static constexpr bool runs = true;
};

// Vectors begin up to a vector's length behind a block, so that one in 32 or 64 ends in the next.
template <class Operation>
void blocks(Program& program, const Kind& kind) {
  const int64_t vector = vector_of(kind);
  together<Operation>(program, kind, {3, 255, 256, 257, 511, 513, 4609}, up_to(vector));
  together<Operation>(program, kind, {8191, 8192, 8193, 24577}, {0, 1, vector - 1});
}

// Codes and values at a boundary each of its own width, where vectors are still walked; and an
// element apart, where they are not.
template <class Operation>
void apart_from_values(Program& program, const Kind& kind) {
  const int64_t vector = vector_of(kind);
  for (const int64_t distance : {int64_t{1}, vector, 3 * vector, 2 * vector + 1}) {
    for (const int64_t numel : {9, 700, 8500}) {
      Ahead ahead = all(0);
      ahead[kOmegaRole] = distance;
      test<Operation>(
          program, kind,
          std::to_string(numel) + " elements/omega " + std::to_string(distance) + " ahead",
          {.shapes = {{kind, numel, ahead}}, .finishes = false});
    }
  }
}

// What compressing never makes: the formulas let it through.
void strange_scales(List& list) {
  const double scales[] = {0, NAN, HUGE_VAL, 1};
  for (int64_t block = 0; block < 4; ++block) {
    list[0].scale(block * kScaleBlock) = static_cast<float>(scales[block]);
  }
}

template <class Operation>
void test_codes(Program& program) {
  for (const Kind& kind : kCodes) {
    blocks<Operation>(program, kind);
    apart_from_values<Operation>(program, kind);
    lists<Operation>(program, kind);
    test<Operation>(program, kind, "scales that are no numbers",
                    {with_sizes(kind, {1000}), {}, strange_scales});
    test<Operation>(program, kind, "not finite", {with_sizes(kind, {37}), {}, not_finite});
  }
  mixed<Operation>(program, kCodes, "mixed with codes");
}

// And of numbers that are narrower than what is computed in; and every kind in one list.
template <class Operation>
void test_any(Program& program) {
  test_codes<Operation>(program);
  for (const Kind& kind : kNumbers) {
    together<Operation>(program, kind);
    apart_from_values<Operation>(program, kind);
    lists<Operation>(program, kind);
    test<Operation>(program, kind, "not finite", {with_sizes(kind, {37}), {}, not_finite});
  }
  mixed<Operation>(program, {std::begin(kKinds), std::end(kKinds)}, "mixed with any omega");
}

}  // namespace

int main(int argc, char** argv) {
  Program program(argc, argv);
#if defined(SIMT_ONLY)  // one of them: for mutate.py
  test_codes<OfCodes<SIMT_ONLY>>(program);
#elif defined(__SANITIZE_THREAD__)  // a race would be the same whatever the operation
  test_codes<OfCodes<AddGradient>>(program);
#else  // of three, four and six streams; the others know of Ω no more than these
  test_any<OfAny<AddGradient>>(program);
  test_codes<OfCodes<Penalty>>(program);
  test_codes<OfCodes<Proximal>>(program);
  test_codes<OfCodes<Step<Adam, false>>>(program);
#endif
  return program.finish();
}
