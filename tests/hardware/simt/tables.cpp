// Tables of pointers (csrc/cuda/table.cuh), which are never followed here; and sums of any number
// of partial sums (csrc/cuda/reduce.cuh).
#include <algorithm>
#include <climits>
#include <iterator>
#include <string>
#include <vector>

#include "csrc/cuda/outer.cuh"
#include "harness/judge.h"

namespace {

using namespace harness;
using mas_ext::cuda::tensor_of_chunk;

// ================================================================================================
// Tables
// ================================================================================================
constexpr size_t kCount = std::size(kKinds);

template <size_t Streams>
using Entries = std::vector<Entry<Streams>>;

template <size_t Streams>
Entries<Streams> make_entries(const std::vector<int64_t>& sizes, Random& random) {
  Entries<Streams> entries;
  for (const int64_t numel : sizes) {
    auto& entry = entries.emplace_back();
    for (void*& data : entry.data) {
      data = reinterpret_cast<void*>(random.bits());
    }
    const Kind kind = kKinds[random.below(kCount)];
    entry.numel = numel, entry.dtype = kind.dtype, entry.omega_dtype = kind.omega_dtype;
    entry.omega_scales = reinterpret_cast<const float*>(random.bits());
    entry.index = random.below(INT_MAX);
  }
  return entries;
}

// Every entry of a kind comes once, in order, with all its chunks.
template <size_t Streams, bool Scaled>
void check_table(Program& program, const Table<Streams, Scaled>& table,
                 const Entries<Streams>& entries, size_t& next) {
  int64_t chunk = 0;
  for (int t = 0; t < table.tensors; ++t, ++next) {
    if (!program.expect(next < entries.size(), "a tensor too many")) {
      return;
    }
    const Entry<Streams>& entry = entries[next];
    const int64_t chunks = entry.numel / kChunk + (entry.numel % kChunk != 0);
    bool right = table.numel[t] == entry.numel && table.first_chunk[t] == chunk &&
                 table.place[t] == entry.index;
    if constexpr (Scaled) {
      right &= table.scales[t] == entry.omega_scales;
    }
    for (size_t s = 0; s < Streams; ++s) {
      right &= table.data[s][t] == entry.data[s];
    }
    for (const int64_t mine : {int64_t{0}, chunks / 2, chunks - 1}) {
      right &= chunks == 0 || tensor_of_chunk(table, static_cast<int>(chunk + mine)) == t;
    }
    program.expect(right, "tensor %zu is not as it was given", next);
    chunk += chunks;
  }
  program.expect(table.chunks() == chunk && chunk <= INT_MAX, "number of chunks");
}

template <size_t Streams>
void check_tables(Program& program, const std::vector<int64_t>& sizes, uint64_t seed) {
  Random random(seed);
  const Entries<Streams> entries = make_entries<Streams>(sizes, random);
  std::vector<Entries<Streams>> by_kind(kCount);
  std::vector<size_t> next(kCount);
  for (size_t k = 0; k < kCount; ++k) {
    std::ranges::copy_if(entries, std::back_inserter(by_kind[k]), [&](const auto& entry) {
      return Kind{entry.dtype, entry.omega_dtype} == kKinds[k];
    });
  }
  size_t latest = 0;
  mas_ext::cuda::for_each_table(entries, [&]<class T, class Kept>(const auto& table) {
    const auto kind = std::ranges::find(kKinds, Kind{kDtype<T>, kDtype<Kept>});
    const auto k = static_cast<size_t>(kind - std::begin(kKinds));
    program.expect(k >= latest && table.chunks() > 0, "kinds out of order, or an empty table");
    latest = k;
    check_table(program, table, by_kind[k], next[k]);
  });
  for (size_t k = 0; k < kCount; ++k) {
    for (; next[k] < by_kind[k].size(); ++next[k]) {
      program.expect(by_kind[k][next[k]].numel == 0, "a tensor is missing");
    }
  }
}

template <size_t Streams>
void test_tables(Program& program) {
  const int64_t capacity = Table<Streams, false>::kCapacity, all = int64_t{INT_MAX} * kChunk;
  const auto add = [&](const std::string& name, const std::vector<int64_t>& sizes) {
    program.test("tables/" + std::to_string(Streams) + " streams/" + name,
                 [&](uint64_t seed) { check_tables<Streams>(program, sizes, seed); });
  };
  const auto count = static_cast<int64_t>(kCount);
  for (const int64_t n :
       {int64_t{0}, int64_t{1}, count * capacity - 1, count * capacity, 21 * capacity}) {
    for (const int64_t numel : {int64_t{1}, kChunk - 1, kChunk, kChunk + 1, 3 * kChunk}) {
      add(std::to_string(n) + " of " + std::to_string(numel),
          std::vector<int64_t>(static_cast<size_t>(n), numel));
    }
  }
  std::vector<int64_t> full;
  for (int64_t i = 0; i < count; ++i) {
    full.insert(full.end(), {all, all, 1, all, 5, all - kChunk, kChunk, 1});
  }
  add("as many chunks as a grid has blocks", full);
  add("one chunk too many", std::vector<int64_t>(40, all / 2 / kChunk * kChunk + kChunk));
  for (int i = 0; i < 8; ++i) {
    Random random(static_cast<uint64_t>(i) + 1);
    std::vector<int64_t> sizes(static_cast<size_t>(random.below(3000)));
    for (int64_t& numel : sizes) {
      numel = random.below(4) == 0 ? 0 : random.below(int64_t{1} << random.below(45));
    }
    add("random " + std::to_string(i), sizes);
  }
}

// ================================================================================================
// The end of a penalty
// ================================================================================================
template <class Value>
void check_finish(Program& program, size_t count, Where where, uint64_t seed) {
  Random random(seed);
  const Buffer partial(8 * count, 0);
  long double sum = 0;
  for (size_t i = 0; i < count; ++i) {
    sum += partial.as<double>()[i] = random.uniform();
  }
  const Strength lambda(0.7, where);
  const long double exact = static_cast<long double>(lambda.value()) / 2 * sum;
  check_value(program, finish<Value>(partial, lambda), {exact, kSum<double> * exact});
}

void test_finish(Program& program) {
  for (const size_t count : {0, 1, 2, 31, 32, 33, 255, 256, 257, 511, 512, 513, 2047, 2049, 9999}) {
    for (const Where where : {Where::kHost, Where::kDeviceDouble, Where::kDeviceFloat}) {
      const std::string name =
          std::to_string(count) + " sums/strength " + std::to_string(static_cast<int>(where));
      program.test("finish/float32/" + name,
                   [&](uint64_t seed) { check_finish<float>(program, count, where, seed); });
      program.test("finish/float64/" + name,
                   [&](uint64_t seed) { check_finish<double>(program, count, where, seed); });
    }
  }
}

// ================================================================================================
// Samples dealt out over blocks
// ================================================================================================
// Parts hold every slot once, in order, and are cut between samples unless magnitudes are summed.
void check_parts(Program& program, const mas_ext::Outer& call, int step) {
  const int64_t per_sample = (call.positions + step - 1) / step * step;
  const int count = mas_ext::cuda::parts_of(call);
  const int64_t unit = call.magnitudes ? step : per_sample;
  int64_t next = 0;
  for (int part = 0; part < count; ++part) {
    const mas_ext::cuda::Slots slots(call, per_sample, step, count, part);
    if (slots.first < slots.last) {
      program.expect(slots.first == next && slots.first % unit == 0, "part %d", part);
      next = slots.last;
    }
  }
  program.expect(next == call.samples * per_sample, "slots are missing");
  program.expect(count == 1 || (count * mas_ext::cuda::tiles_of(call) <= 512 &&
                                count * 128 <= call.samples * call.positions),
                 "%d parts", count);
}

void test_parts(Program& program) {
  for (int i = 0; i < 100; ++i) {
    program.test("parts/random " + std::to_string(i), [&](uint64_t seed) {
      Random random(seed);
      mas_ext::Outer call{};
      call.magnitudes = random.below(2) == 0;
      call.samples = call.magnitudes ? 1 : 1 + random.below(2000);
      call.positions = 1 + random.below(int64_t{1} << random.below(18));
      call.rows = 1 + random.below(int64_t{1} << random.below(12));
      call.columns = 1 + random.below(int64_t{1} << random.below(12));
      check_parts(program, call, random.below(2) == 0 ? 1 : 16);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  Program program(argc, argv);
  test_tables<2>(program);
  test_tables<3>(program);
  test_tables<4>(program);
  test_tables<5>(program);
  test_tables<6>(program);
  test_finish(program);
  test_parts(program);
  return program.finish();
}
