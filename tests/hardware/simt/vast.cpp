// Offsets of more than 2³¹ elements: address space without memory, in which only the places that
// some blocks should touch are real.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "harness/list_cases.h"
#include "harness/low_rank.h"
#include "harness/outer.h"
#include "harness/steps.h"

namespace {

using namespace harness;

// ================================================================================================
// A list of 77 elements and of more than 2³²
// ================================================================================================
constexpr int64_t kEdge = (int64_t{1} << 31) / kChunk;  // the chunk that begins at element 2³¹
constexpr int64_t kNumel = (2 * kEdge + 2) * kChunk + 5;
constexpr int64_t kAround = 64;  // elements on either side of a chunk that are looked at

template <class Operation, class T, class Kept>
class VastList {
 public:
  VastList(Program& program, const Kind& kind, uint64_t seed)
      : program_(program),
        kind_(kind),
        seed_(seed),
        scales_(mas_ext::is_codes(kind.omega_dtype) ? 4 * scales_of(kNumel) : 1, 0) {
    for (const Role role : Operation::roles) {
      streams_.emplace_back(static_cast<size_t>(kNumel) * width(kind, role), 0);
    }
  }

  void run() {
    const Buffer partial(8 * (2 * kEdge + 4), 0);
    for (const int64_t chunk : kChunks) {
      const List list = make(chunk);
      const Parameter& parameter = list.front();
      for (size_t s = 0; s < streams_.size(); ++s) {
        const Buffer& from = parameter.of[Operation::roles[s]];
        std::memcpy(at(s, chunk * kChunk), from.as<void>(), from.size());
      }
      std::memcpy(scales_.as<float>() + chunk * (kChunk / kScaleBlock), parameter.scales.as<void>(),
                  parameter.scales.size());
    }
    launch(partial);
    for (const int64_t chunk : kChunks) {
      check(chunk, partial.as<double>() + 1 + chunk);
    }
  }

 private:
  static constexpr int64_t kChunks[] = {0, kEdge, 2 * kEdge, 2 * kEdge + 2};

  unsigned char* at(size_t stream, int64_t element) const {
    const size_t bytes = width(kind_, Operation::roles[stream]);
    return streams_[stream].template as<unsigned char>() + static_cast<size_t>(element) * bytes;
  }

  // A chunk's values as a tensor of its own.
  List make(int64_t chunk) const {
    return make_list({{kind_, std::min(kChunk, kNumel - chunk * kChunk), {}}},
                     seed_ + static_cast<uint64_t>(chunk), kMoments<Operation>);
  }

  void launch(const Buffer& partial) const {
    const List small = make_list({{kind_, 77, {}}}, seed_, kMoments<Operation>);
    auto entries = entries_of<Operation>(small);
    auto vast = entries.front();
    entries.front().index = 1, vast.index = 0;
    vast.numel = kNumel, vast.omega_scales = scales_.as<float>();
    for (size_t s = 0; s < streams_.size(); ++s) {
      vast.data[s] = at(s, 0);
    }
    entries.push_back(vast);
    Operation::prepare(told_, entries.size());
    simt::Launch grid{{0}};
    for (const int64_t chunk : kChunks) {
      grid.blocks.push_back(static_cast<unsigned>(1 + chunk));  // behind that of the small one
    }
    mas_ext::cuda::for_each_table(entries, [&]<class U, class K>(const auto& table) {
      if constexpr (std::is_same_v<U, T> && std::is_same_v<K, Kept>) {
        const auto operation = Operation::template make<T>(told_);
        simt::run(grid, kThreads, [&] {
          mas_ext::cuda::chunk_kernel<Operation::template Operation, T, Kept>(table, operation,
                                                                              partial.as<double>());
        });
      }
    });
  }

  void check(int64_t chunk, const double* sum) const {
    const List before = make(chunk), after = make(chunk);
    const int64_t begin = chunk * kChunk, end = begin + after.front().shape.numel;
    for (size_t s = 0; s < streams_.size(); ++s) {
      const Buffer& to = after.front().of[Operation::roles[s]];
      std::memcpy(to.as<void>(), at(s, begin), to.size());
      program_.expect(is_zero(s, begin - kAround, begin) && is_zero(s, end, end + kAround),
                      "memory around chunk %ld was written", static_cast<long>(chunk));
    }
    const Judge<Operation> judge(program_, told_, before, after);
    judge.lists();
    if constexpr (Operation::sums) {
      const Buffer partial(8, 0);
      *partial.as<double>() = *sum;
      judge.sums(partial);
    }
  }

  bool is_zero(size_t stream, int64_t begin, int64_t end) const {
    return std::all_of(at(stream, std::max<int64_t>(begin, 0)), at(stream, std::min(end, kNumel)),
                       [](unsigned char byte) { return byte == 0; });
  }

  Program& program_;
  const Kind kind_;
  const uint64_t seed_;
  const Told told_{Strengths{}};
  const VastBuffer scales_;
  std::vector<VastBuffer> streams_;
};

template <class Operation, class T, class Kept>
void test_list(Program& program, const Kind& kind) {
  program.test(std::string("vast/") + Operation::name + "/" + name_of(kind),
               [&](uint64_t seed) { VastList<Operation, T, Kept>(program, kind, seed).run(); });
}

template <class Operation>
void test_list(Program& program) {
  test_list<Operation, BFloat16, float>(program, {ScalarType::BFloat16, ScalarType::Float});
  test_list<Operation, float, float>(program, {ScalarType::Float, ScalarType::Float});
}

// ================================================================================================
// Factors and an Ω whose elements lie far apart
// ================================================================================================
constexpr int64_t kFar = int64_t{1} << 31;

const std::vector<Layouts> kLayouts{
    {"samples of left", kRowMajor, {"", {2, 1, 0}, 1, {0, kFar}}, kContiguous},
    {"positions of right", kRowMajor, kContiguous, {"", {2, 1, 0}, 1, {kFar / 2}}},
    {"rows of left", kRowMajor, {"", {2, 1, 0}, kFar / 64}, kContiguous},
    {"rows of omega", {"", {1, 0}, 1, {kFar / 32}}, kContiguous, kContiguous},
    {"columns of omega", {"", {0, 1}, 1, {kFar / 32}}, kContiguous, kContiguous},
};

template <class T>
void test_outer(Program& program, const std::string& dtype) {
  for (const Layouts& layouts : kLayouts) {
    program.test("vast/outer/" + dtype + "/" + layouts.name, [&](uint64_t seed) {
      const OuterCase c{{3, 3, 66, 67}, layouts};
      Problem<T, VastBuffer> before(c), after(c);
      before.fill(seed, 0);
      after.fill(seed, 0);
      Launches(after, c).run();
      check_omega(program, before, after, c);
    });
  }
}

const Layout kRanksInside{"", {1, 0}};

const std::vector<LowRankLayouts> kLowRankLayouts{
    {"rows of omega", {"", {1, 0}, 1, {kFar / 16}}, kRanksInside, kRanksInside},
    {"columns of omega", {"", {1, 0}, kFar / 32}, kRanksInside, kRanksInside},
    {"rows of left", kRowMajor, {"", {1, 0}, 1, {kFar / 16}}, kRanksInside},
    {"ranks of right", kRowMajor, kRanksInside, {"", {0, 1}, 1, {kFar}}},
};

void test_low_rank(Program& program) {
  for (const LowRankLayouts& layouts : kLowRankLayouts) {
    program.test(std::string("vast/low_rank/") + layouts.name, [&](uint64_t seed) {
      const LowRankCase c{.size = {66, 67, 3}, .layouts = layouts};
      LowRankProblem<float, float, VastBuffer> before(c), after(c);
      before.fill(c, seed);
      after.fill(c, seed);
      const float value = LowRankLaunches(after, c).run();
      const LowRankOracle oracle(program, before, c);
      oracle.check_value(value);
      oracle.check_grads(after.grad_left, before.grad_left, true);
      oracle.check_grads(after.grad_right, before.grad_right, false);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  Program program(argc, argv);
  test_list<Importance>(program);  // of two, four, three and six streams
  test_list<AddGradient>(program);
  test_list<Proximal>(program);
  test_list<Step<Adam, false>>(program);
  test_list<AddGradient, float, uint8_t>(program, {ScalarType::Float, ScalarType::Byte});
  test_outer<float>(program, "float32");
  test_outer<BFloat16>(program, "bfloat16");
  test_low_rank(program);
  return program.finish();
}
