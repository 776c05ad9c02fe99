"""Bugs that somebody could write into the kernels, and the run of test_simt.py that notices each.

To add one: a name, the run, text that occurs once in its file under csrc/, and what replaces it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parents[3] / "csrc"


class Run(NamedTuple):
    """A program, or its cases of one operation or dtype.

    Compiled without a sanitizer where a wrong value gives the bug away: a sanitizer doubles the
    time that it takes to compile.
    """

    program: str
    sanitizer: str = "none"
    only: str = ""  # as in C++

    def sanitized(self) -> Run:
        """The same, watched for accesses that are out of bounds or misaligned."""
        return self._replace(sanitizer="address")


class Mutant(NamedTuple):
    name: str
    run: Run
    old: str
    new: str
    file: str

    def planted(self) -> str:
        """The text of the file with the bug in it."""
        text = (CSRC / self.file).read_text()
        if text.count(self.old) != 1:
            found = f"{text.count(self.old)} times in {self.file}"
            raise ValueError(f"the mutant {self.name!r} is stale: its text occurs {found}")
        return text.replace(self.old, self.new)


TABLES = Run("tables")
VAST = Run("vast", "address")
IMPORTANCE = Run("multi_tensor", only="Importance")
SQUARE = Run("multi_tensor", only="ImportanceSquare")
ADD = Run("multi_tensor", only="AddGradient")
PROXIMAL = Run("multi_tensor", only="Proximal")
CODES = Run("compressed", only="AddGradient")
CODES_PENALTY = Run("compressed", only="Penalty")
SGD = Run("steps", only="Step<Sgd, false>")
MOMENTUM = Run("steps", only="Step<Momentum, false>")
ADAM = Run("steps", only="Step<Adam, false>")
PROXIMAL_ADAM = Run("steps", only="Step<Adam, true>")
LIST_RACES = Run("multi_tensor", "thread", "Penalty")
SUM_RACES = Run("tables", "thread")
OUTER = Run("outer", only="float")
TENSOR_CORES = Run("outer", only="BFloat16")
OUTER_RACES = Run("outer", "thread", "float")
FRAGMENT_RACES = Run("outer", "thread", "BFloat16")
LOW_RANK = Run("low_rank", only="float")
LOW_RANK_CODES = Run("low_rank", only="float, uint8_t")
LOW_RANK_RACES = Run("low_rank", "thread", "float")

# fmt: off
BY_FILE = {
    "cuda/table.cuh": [
        ("chunks rounded down", TABLES, "(numel + kChunk - 1) / kChunk", "numel / kChunk"),
        ("first chunk off by one", TABLES,
         "table.first_chunk[table.tensors++] = static_cast<int>(chunks);",
         "table.first_chunk[table.tensors++] = static_cast<int>(chunks) + 1;"),
        ("numel of the tensor before", TABLES,
         "table.numel[table.tensors] = entry.numel;",
         "table.numel[table.tensors] = entries[next > 0 ? next - 1 : 0].numel;"),
        ("one pointer for all streams", TABLES, "= entry.data[s];", "= entry.data[0];"),
        ("dtypes mixed", TABLES, "entry.dtype != kind.dtype || ", ""),
        ("omegas of other dtypes among them", TABLES,
         " || entry.omega_dtype != kind.omega_dtype", ""),
        ("scales of the tensor before", TABLES,
         "table.scales[table.tensors] = entry.omega_scales;",
         "table.scales[table.tensors] = entries[next > 0 ? next - 1 : 0].omega_scales;"),
        ("a block more than a grid has", TABLES, "> INT_MAX) {", "> INT_MAX + int64_t{1}) {"),
        ("a tensor more than a table holds", TABLES.sanitized(),
         "table.tensors < table.kCapacity", "table.tensors <= table.kCapacity"),
        ("a place of its own, not in the lists", TABLES,
         "static_cast<int>(entry.index);", "table.tensors;"),
        ("the tensor before the chunk's", TABLES,
         "table.first_chunk[middle] <= chunk", "table.first_chunk[middle] < chunk"),
    ],
    "cuda/multi_tensor.cuh": [
        ("32-bit offset, in elements", VAST,
         "static_cast<int64_t>(chunk - table.first_chunk[tensor]) * kChunk",
         "static_cast<int>((chunk - table.first_chunk[tensor]) * unsigned{kChunk})"),
        ("32-bit offset, in bytes", VAST, "begin * width(s)", "static_cast<int>(begin * width(s))"),
        ("chunk counted from the table's first tensor", ADD.sanitized(),
         "static_cast<int64_t>(chunk - table.first_chunk[tensor])", "static_cast<int64_t>(chunk)"),
        ("every chunk is whole", ADD.sanitized(),
         "static_cast<int>(left < kChunk ? left : kChunk)",
         "static_cast<int>(left < 0 ? left : kChunk)"),
        ("omega as wide as values", ADD.sanitized(),
         "static_cast<int>(stream == Op::kOmega ? sizeof(Stored) : sizeof(T))",
         "static_cast<int>(stream == Op::kOmega ? sizeof(T) : sizeof(T))"),
        ("omega as wide as it is computed", CODES.sanitized(),
         "static_cast<int>(stream == Op::kOmega ? sizeof(Stored) : sizeof(T))",
         "static_cast<int>(stream == Op::kOmega ? sizeof(A) : sizeof(T))"),
        ("codes at any alignment", CODES.sanitized(),
         "stream == Op::kOmega ? alignof(Pack<Stored, kVector>) : kVectorBytes",
         "stream == Op::kOmega ? 1 : kVectorBytes"),
        ("scales of the tensor's first blocks", CODES.sanitized(),
         "table.scales[tensor] + begin / kScaleBlock", "table.scales[tensor]"),
        ("scales of another chunk", CODES.sanitized(),
         "begin / kScaleBlock", "begin / (2 * kScaleBlock)"),
        ("32-bit offset of scales", VAST,
         "+ begin / kScaleBlock", "+ static_cast<int>(begin) / kScaleBlock"),
        ("head counted twice", ADD.sanitized(),
         "walk<kVector>(op, head, tail)", "walk<kVector>(op, 0, tail)"),
        ("head dropped", ADD, "return walk<1>(op, 0, head) + ", "return "),
        ("tail dropped", ADD, " + walk<1>(op, tail, size_);", ";"),
        ("alignment of the first stream alone", ADD.sanitized(),
         "aligned &= (reinterpret_cast", "aligned &= s > 0 || (reinterpret_cast"),
        ("head longer than the chunk", ADD.sanitized(),
         "bool aligned = head <= size_;", "bool aligned = true;"),
        ("second load without a bound", ADD.sanitized(),
         "if (first + u * kStride < end) {\n          elements[u].load",
         "{\n          elements[u].load"),
        ("second load's bound one too far", ADD.sanitized(),
         "if (first + u * kStride < end) {\n          elements[u].load",
         "if (first + u * kStride <= end) {\n          elements[u].load"),
        ("second store without a bound", ADD.sanitized(),
         "if (first + u * kStride < end) {\n          sum += elements[u].compute(op);\n",
         "{\n          sum += elements[u].compute(op);\n"),
        ("rounds overlap", ADD, "first += kUnroll * kStride) {", "first += kStride) {"),
        ("threads overlap", ADD,
         "constexpr int kStride = kThreads * N;", "constexpr int kStride = kThreads / 2 * N;"),
        ("stored before computed", ADD,
         "sum += elements[u].compute(op);\n"
         "          elements[u].store(streams_, first + u * kStride);",
         "elements[u].store(streams_, first + u * kStride);\n"
         "          sum += elements[u].compute(op);"),
        ("a place in the table, not in the lists", ADAM,
         "op.begin_tensor(table.place[tensor]);", "op.begin_tensor(tensor);"),
        ("no begin_tensor", ADAM, "op.begin_tensor(table.place[tensor]);", ""),
        ("a skipped call is not", MOMENTUM, "if (op.skipped) {", "if (false) {"),
        ("all blocks in one partial sum", ADD.sanitized(),
         "partial_sums[blockIdx.x] = total;", "partial_sums[0] = total;"),
        ("every thread writes the sum", LIST_RACES,
         "if (threadIdx.x == 0) {\n      partial_sums", "{\n      partial_sums"),
    ],
    "cuda/pack.cuh": [
        ("first of a pair clears the second", ADD, "(word & 0xffff0000u) | bits", "bits"),
        ("pairs swapped", ADD, ">> (16 * (i % 2))", ">> (16 - 16 * (i % 2))"),
        ("codes of a word turned round", CODES, ">> (8 * (i % 4))", ">> (24 - 8 * (i % 4))"),
        ("the first word's codes twice", CODES, "words_[i / 4]", "words_[0]"),
    ],
    "cuda/omega.cuh": [
        ("scale of the block before", CODES,
         "scales[first / kBlock]", "scales[(first > kBlock ? first - kBlock : first) / kBlock]"),
        ("blocks twice as long", CODES, "kBlock = kScaleBlock;", "kBlock = 2 * kScaleBlock;"),
        ("one scale a vector", CODES, "(first + N - 1) / kBlock", "first / kBlock"),
        ("scale behind the vector", CODES.sanitized(),
         "(first + N - 1) / kBlock", "(first + N) / kBlock"),
        ("an element more of the block", CODES, "i < left_", "i <= left_"),
        ("an element less of the block", CODES, "i < left_", "i + 1 < left_"),
        ("scales swapped", CODES, "? of_first_ : of_last_", "? of_last_ : of_first_"),
        ("as if vectors began with blocks", CODES,
         "kBlock - first % kBlock", "kBlock - first / N * N % kBlock"),
        ("codes of the chunk's beginning", CODES_PENALTY,
         "static_cast<const uint8_t*>(codes) + first)",
         "static_cast<const uint8_t*>(codes) + first % kBlock)"),
    ],
    "formulas.h": [
        ("no magnitude", IMPORTANCE, "return scale * Magnitude::of(grad);", "return scale * grad;"),
        ("scale applied twice", IMPORTANCE,
         "return scale * Magnitude::of(grad);", "return scale * scale * Magnitude::of(grad);"),
        ("square is not one", SQUARE, "return value * value;", "return value;"),
        ("square in 16 bits", TENSOR_CORES, "sizeof(T) >= sizeof(float);", "true;"),
        ("sign", PROXIMAL, "param - delta * (c", "param + delta * (c"),
        ("not a square", ADD, "return omega * delta * delta;", "return omega * delta;"),
        ("codes not companded", CODES, "root * root * (", "255 * root * ("),
        ("codes up to 256", CODES, "65025.0f", "65536.0f"),
        ("infinite strength", ADD,
         "scalar > static_cast<double>(largest) ? largest : static_cast<A>(scalar)",
         "scalar < 0 ? largest : static_cast<A>(scalar)"),
        ("infinity over infinity", PROXIMAL,
         "product > largest ? largest : product", "product < 0 ? largest : product"),
        ("pulled from where the step began", PROXIMAL_ADAM,
         "proximal_point(moved, moved - anchor,", "proximal_point(moved, param - anchor,"),
        ("no importance, no bits kept", PROXIMAL, "omega == A(0) ? param : moved", "moved"),
    ],
    "cuda/operations.cuh": [
        ("square of another kind", SQUARE,
         "AccumulateMagnitude<T, MagnitudeSquare>", "AccumulateMagnitude<T, MagnitudeAbs>"),
        ("strength squared", PROXIMAL,
         "lambda.load() * lr.load()", "lambda.load() * lr.load() * lambda.load()"),
        ("no gradient scale", ADD, "lambda.load() * grad_scale.load()", "lambda.load()"),
        ("replaces where it should add", ADD, "Add ? element[0] + gradient : gradient", "gradient"),
        ("adds to what is not read", ADD, "Add ? 0b1111 : 0b1110", "Add ? 0b1110 : 0b1110"),
        ("energy of the old parameter", PROXIMAL,
         "penalty_energy(element[0] - anchor, omega)", "penalty_energy(param - anchor, omega)"),
        ("energy before rounding", PROXIMAL,
         "const T moved = static_cast<T>(", "const A moved = static_cast<A>("),
    ],
    "cuda/steps.cuh": [
        ("found_inf ignored", ADAM, "read.found_inf != 0.0", "false"),
        ("the gradient for the anchor in a skipped step", ADAM, "kOmega - 1;", "kOmega - 2;"),
        ("second moment not written", ADAM,
         "(1u << (kMoments + 1)) - 1", "(1u << (kMoments > 1 ? kMoments : kMoments + 1)) - 1"),
        ("the gradient for the anchor", SGD, "element[kMoments + 2]", "element[kMoments + 1]"),
        ("energy before a proximal step", PROXIMAL_ADAM,
         "(Proximal ? element[0] : param) - anchor", "param - anchor"),
        ("energy after a gradient step", MOMENTUM,
         "(Proximal ? element[0] : param) - anchor", "element[0] - anchor"),
        ("a correction too many", ADAM.sanitized(), "if (i < count) {", "if (i <= count) {"),
    ],
    "steps.h": [
        ("corrections swapped", ADAM, "lr * correction.first", "lr * correction.second_root"),
        ("the step before's correction", ADAM,
         "pow(options.beta1, steps + 1.0)", "pow(options.beta1, steps)"),
        ("descends where it should ascend", SGD, "maximize ? -factor : factor", "factor"),
        ("no rate in a proximal strength", PROXIMAL_ADAM,
         "proximal ? s.lambda * s.lr : s.lambda", "s.lambda"),
        ("no dampening", MOMENTUM, "1.0 - options.dampening", "1.0"),
        ("decay in the gradient as well", ADAM,
         "options.decoupled ? 0.0 : options.weight_decay", "options.weight_decay"),
    ],
    "cuda/scalar.cuh": [
        ("strength of another width", TABLES, "return is_double ? *", "return !is_double ? *"),
    ],
    "cuda/reduce.cuh": [
        ("no barrier before the warps' sums", SUM_RACES, "  __syncthreads();\n", ""),
        ("half of a warp", TABLES, "offset = kWarp / 2;", "offset = kWarp / 4;"),
        ("mask of half a warp", TABLES, "0xffffffffu", "0xffffu"),
        ("last warp forgotten", TABLES, "w < kWarps;", "w < kWarps - 1;"),
        ("warps' sums in float", TABLES,
         "__shared__ double warp_sums", "__shared__ float warp_sums"),
        ("barrier for one warp", TABLES,
         "  __syncthreads();\n", "  if (warp == 0) __syncthreads();\n"),
        ("without the half", TABLES, "0.5 * lambda.load()", "lambda.load()"),
        ("first sum forgotten", TABLES, "int64_t i = threadIdx.x;", "int64_t i = threadIdx.x + 1;"),
        ("a sum too many", TABLES.sanitized(),
         "i < count; i += kThreads", "i <= count; i += kThreads"),
    ],
    "outer.h": [
        ("samples summed with their sign", OUTER,
         "call.magnitudes = true;", "call.magnitudes = false;"),
        ("turned, but for the factors", OUTER.sanitized(),
         "std::swap(call.left, call.right);", ""),
    ],
    "cuda/stage.cuh": [
        ("right where left is", OUTER, "offset(call.right);", "offset(call.left);"),
        ("32-bit offset of a sample", VAST,
         "sample * factor.sample_stride + position",
         "static_cast<int>(sample * factor.sample_stride) + position"),
        ("32-bit offset of a row", VAST,
         "offsets[slot] + (first_row + row) * factor.row_stride",
         "offsets[slot] + static_cast<int>((first_row + row) * factor.row_stride)"),
        ("row stride left out", OUTER,
         "(first_row + row) * factor.row_stride]", "first_row + row]"),
        ("positions of the next sample", TENSOR_CORES.sanitized(),
         "sample < call.samples && position < call.positions", "sample < call.samples"),
        ("slots beyond a sample stay as they were", TENSOR_CORES,
         "tile[slot][row] = value;", "if (offsets[slot] != kNone) tile[slot][row] = value;"),
        ("magnitude of elements left out", OUTER,
         "value = magnitudes ? Magnitude::of(value) : value;", ""),
        ("vectors of unaligned memory", OUTER.sanitized(),
         "reinterpret_cast<uintptr_t>(factor.data) % kVectorBytes == 0 &&", ""),
        ("vectors of unaligned positions", OUTER.sanitized(),
         "(factor.sample_stride | factor.position_stride | rows)", "(factor.sample_stride | rows)"),
        ("vectors of unaligned samples", OUTER.sanitized(),
         "(factor.sample_stride | factor.position_stride | rows)",
         "(factor.position_stride | rows)"),
        ("vectors across the last row", OUTER.sanitized(),
         "(factor.sample_stride | factor.position_stride | rows)",
         "(factor.sample_stride | factor.position_stride)"),
        ("magnitude of every second value", OUTER,
         "for (int v = 0; v < kVector; ++v) {", "for (int v = 0; v < kVector; v += 2) {"),
    ],
    "cuda/outer.cuh": [
        ("no barrier after staging, of fragments", FRAGMENT_RACES,
         "    __syncthreads();\n#pragma unroll 1", "#pragma unroll 1"),
        ("no barrier before staging", OUTER_RACES,
         "__syncthreads();  // also: every thread is done with the slots before", ""),
        ("no barrier after staging", OUTER_RACES,
         "    __syncthreads();\n#pragma unroll 1", "#pragma unroll 1"),
        ("no barrier before the sums", OUTER_RACES,
         "__syncthreads();  // the sums take the stage's place", ""),
        ("no barrier after the sums", OUTER_RACES,
         "tile.store(shared.sums);\n  __syncthreads();", "tile.store(shared.sums);"),
        ("samples summed that are not squared", TENSOR_CORES,
         "if constexpr (Magnitude::template fits_in<T>)", "if constexpr (true)"),
        ("squares squared", OUTER,
         "Magnitude::kIdempotent || !magnitudes", "true"),
        ("samples share a multiplication", TENSOR_CORES,
         "(call.positions + kStep - 1) / kStep * kStep", "call.positions"),
        ("a sample never ends twice", OUTER, "        multiplied = 0;\n", ""),
        ("the rest of a part is lost", OUTER, "if (multiplied > 0) {", "if (false) {"),
        ("parts cut within a sample", OUTER,
         "call.magnitudes ? step : per_sample;", "true ? step : per_sample;"),
        ("parts rounded down", OUTER, "(all / unit + parts - 1) / parts", "(all / unit) / parts"),
        ("slots of the next part", OUTER, "first + slot < slots.last;", "true;"),
        ("all parts in one place", OUTER.sanitized(),
         "(part * call.rows + row)", "(0 * call.rows + row)"),
        ("every part adds to omega", OUTER.sanitized(),
         "if (parts.count == 1) {", "if (parts.count >= 1) {"),
        ("a part too few", OUTER, "part < parts.count; ++part", "part < parts.count - 1; ++part"),
        ("an element too many", OUTER.sanitized(), "if (i < size) {", "if (i <= size) {"),
        ("row guard one too far", OUTER.sanitized(), "row < call.rows &&", "row <= call.rows &&"),
        ("column guard one too far", OUTER.sanitized(),
         "column < call.columns)", "column <= call.columns)"),
        ("columns of another tile", OUTER,
         "at / tiles_of(call.columns) * kTile", "at / tiles_of(call.rows) * kTile"),
    ],
    "low_rank.h": [
        ("transposed, but for the factors", LOW_RANK.sanitized(),
         "std::swap(call.left, call.right);", ""),
        ("transposed, but for omega", LOW_RANK.sanitized(),
         "std::swap(call.row_stride, call.column_stride);", ""),
    ],
    "cuda/low_rank.cuh": [
        ("ranks of the part", LOW_RANK.sanitized(),
         "blockIdx.x / across % parts;", "blockIdx.x / across / parts;"),
        ("a block's ranks overlap", LOW_RANK.sanitized(),
         "blockIdx.x / across / parts * kBlockRanks", "blockIdx.x / across / parts * kRanks"),
        ("places beyond a factor", LOW_RANK.sanitized(),
         "if (place < places && k < ranks) {", "if (k < ranks) {"),
        ("ranks beyond a factor", LOW_RANK.sanitized(),
         "if (place < places && k < ranks) {", "if (place < places) {"),
        ("stride of ranks left out", LOW_RANK,
         "+ k * factor.rank_stride", "+ k"),
        ("32-bit offset of a place in a factor", VAST,
         "+ place * factor.stride", "+ static_cast<int>(place * factor.stride)"),
        ("32-bit offset of a rank", VAST,
         "+ k * factor.rank_stride", "+ static_cast<int>(k * factor.rank_stride)"),
        ("some places twice", LOW_RANK, "i % kTile : i / Ranks", "i % kTile : i % Ranks"),
        ("scales of another block of codes", LOW_RANK_CODES,
         "place / kScaleBlock]", "place / (2 * kScaleBlock)]"),
        ("32-bit offset of omega's row", VAST,
         "(row + row_of(v)) * call.row_stride",
         "static_cast<int>((row + row_of(v)) * call.row_stride)"),
        ("omega beyond its rows", LOW_RANK.sanitized(),
         "row_of(v) < rows_ && column_of", "column_of"),
        ("omega beyond its columns", LOW_RANK,
         "row_of(v) < rows_ && column_of(v) < columns_", "row_of(v) < rows_"),
        ("the product beyond omega", LOW_RANK, "is_inside(v) ? product : A(0)", "product"),
        ("energy without weights", LOW_RANK,
         "energy += product * delta;", "energy += delta * delta;"),
        ("a product that is not weighed", LOW_RANK,
         "product = omega_[v] * delta;", "product = delta;"),
        ("no barrier before ranks are staged", LOW_RANK_RACES,
         "__syncthreads();  // every thread is done with what was staged before", ""),
        ("no barrier after ranks are staged", LOW_RANK_RACES,
         "    __syncthreads();\n#pragma unroll 1", "#pragma unroll 1"),
        ("no barrier before the product is weighed", LOW_RANK_RACES,
         "shared);\n    __syncthreads();", "shared);"),
        ("no barrier before the left factor is staged", LOW_RANK_RACES,
         "__syncthreads();  // P is weighed, and nobody reads what was staged before", ""),
        ("no barrier after the left factor is staged", LOW_RANK_RACES,
         "        __syncthreads();\n        sums[t].multiply", "        sums[t].multiply"),
        ("no barrier before the quarters' sums", LOW_RANK_RACES,
         "__syncthreads();  // the sums take the place of P, and of the sums before", ""),
        ("no barrier after the quarters' sums", LOW_RANK_RACES,
         "sums[t].store(shared.weighted);\n      __syncthreads();",
         "sums[t].store(shared.weighted);"),
        ("a rank too few", LOW_RANK,
         "first + slot < call.rank; ++slot", "first + slot + 1 < call.rank; ++slot"),
        ("quarters of the same rows", LOW_RANK, "quarter() * (kTile / 4) + i", "i"),
        ("a quarter forgotten", LOW_RANK, "quarter < 4; ++quarter", "quarter < 3; ++quarter"),
        ("all quarters' sums are the first's", LOW_RANK,
         "shared.weighted[quarter * kRanks + i / kTile]", "shared.weighted[i / kTile]"),
        ("all parts in one place, of ranks", LOW_RANK.sanitized(),
         "+ part * call.rank * call.columns;", "+ 0 * part;"),
        ("column guard one too far, of ranks", LOW_RANK.sanitized(),
         "column < call.columns) {", "column <= call.columns) {"),
        ("rank guard one too far", LOW_RANK.sanitized(),
         "if (k < call.rank &&", "if (k <= call.rank &&"),
        ("rows of the next part", LOW_RANK,
         "(block.part + 1) * rows < call.rows ? (block.part + 1) * rows : call.rows", "call.rows"),
        ("rows divided rounding down", LOW_RANK,
         "divide_up(row_tiles(call), parts.count)", "row_tiles(call) / parts.count"),
        ("energy of all tiles of ranks", LOW_RANK.sanitized(), "block.rank == 0 && ", ""),
        ("energy of all parts in one place", LOW_RANK.sanitized(),
         "energies[block.part * column_tiles(call) + ", "energies["),
        ("energy scaled once", LOW_RANK, "call.scale * call.scale * total", "call.scale * total"),
        ("an element too many, of a gradient", LOW_RANK.sanitized(),
         "if (i >= size) {", "if (i > size) {"),
        ("a part's sums too few", LOW_RANK,
         "part < parts.count; ++part", "part < parts.count - 1; ++part"),
        ("a gradient that replaces", LOW_RANK,
         "static_cast<A>(grad) + coefficient * sum", "coefficient * sum"),
        ("a gradient scaled once", LOW_RANK,
         "lambda.load() * call.scale * call.scale", "lambda.load() * call.scale"),
        ("a gradient's strides swapped", LOW_RANK.sanitized(),
         "i / call.columns * call.right.grad_rank_stride",
         "i / call.columns * call.right.grad_stride"),
    ],
    "cuda/fma_tile.cuh": [
        ("product not reset", OUTER, "product_[r][c] = A(0);", ""),
        ("sum of products with their sign", OUTER, "+= Magnitude::of(product_", "+= (product_"),
    ],
    "cuda/tensor_core_tile.cuh": [
        ("fragment not reset", TENSOR_CORES,
         "        }\n        wmma::fill_fragment(product_[r][c], 0.0f);", "        }"),
        ("fragment with its sign", TENSOR_CORES, "+= Magnitude::of(product_", "+= (product_"),
        ("left not transposed", TENSOR_CORES,
         "Element, wmma::col_major>", "Element, wmma::row_major>"),
        ("two warps, one quarter", TENSOR_CORES,
         "/ 32 / kAcross * kWarpTile", "/ 32 % kAcross * kWarpTile"),
    ],
}
# fmt: on

MUTANTS = [Mutant(*mutant, file) for file, mutants in BY_FILE.items() for mutant in mutants]
