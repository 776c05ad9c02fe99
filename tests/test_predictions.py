"""The predictions for GPUs: what is counted is counted, and the model obeys what bounds it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import abs_matmul as measured_abs_matmul
from benchmarks.predict import (
    GPUS,
    JOBS,
    Problem,
    abs_matmul,
    count,
    evenly,
    find_gpu,
    large,
    launches,
    predict,
    predict_abs_matmul,
    ways,
)
from benchmarks.predict.sizes import LARGE

ROOT = Path(__file__).parents[1]
H100 = GPUS["h100"]
DTYPES = ("float32", "float64", "bfloat16", "float16")
OPERATIONS = {
    "accumulate_importance_": ("AccumulateImportance", "Og"),
    "penalty": ("PenaltyEnergy", "paO"),
    "add_penalty_grad_": ("PenaltyGradientOf", "gpaO"),
    "proximal_step_": ("ProximalStep", "paO"),
}


# ================================================================================================
# What is stated is what the sources and PyTorch say
# ================================================================================================
def _constants() -> dict[str, int]:
    text = "".join(path.read_text() for path in sorted((ROOT / "csrc/cuda").glob("*.cuh")))
    return {name: int(value) for name, value in re.findall(r"\b(k[A-Z]\w+) = (\d+)[;,]", text)}


@pytest.mark.parametrize(
    ("constant", "value"),
    [
        ("kThreads", launches.THREADS),
        ("kChunk", launches.CHUNK),
        ("kUnroll", launches.UNROLL),
        ("kVectorBytes", launches.VECTOR_BYTES),
        ("kTableBytes", launches.TABLE_BYTES),
        ("kTile", abs_matmul.TILE),
        ("kRows", abs_matmul.FMA_ROWS),
        ("kSide", abs_matmul.FRAGMENT),
        ("kFragments", abs_matmul.FRAGMENTS),
        ("kBlocks", abs_matmul.BLOCKS),
        ("kLeastPairs", abs_matmul.LEAST_PAIRS),
    ],
)
def test_constants_are_those_of_the_kernels(constant, value):
    assert _constants()[constant] == value


def test_a_table_is_cut_as_that_of_the_kernels():
    text = (ROOT / "csrc/cuda/table.cuh").read_text()
    pointers = r"8 \* \(static_cast<int>\(Streams\) \+ Scaled\)"  # and one to scales, of codes
    (entry,) = re.findall(rf"kTableBytes / \({pointers} \+ (\d+)\)", text)
    assert int(entry) == launches.ENTRY_BYTES


@pytest.mark.parametrize("job", OPERATIONS)
def test_ours_moves_what_the_kernels_masks_say(job):
    name, streams = OPERATIONS[job]
    text = (ROOT / "csrc/cuda/operations.cuh").read_text().split(f"struct {name} ")[1]
    reads, writes = (
        {stream for bit, stream in enumerate(streams) if int(mask, 2) >> bit & 1}
        for mask in (
            re.search(r"kReads = (?:Add \? )?0b(\d+)", text)[1],
            re.search(r"kWrites = (?:0b)?(\d+)", text)[1],
        )
    )
    ((kernel,),) = JOBS[job]["mas_ext"].phases
    assert (set(kernel.reads), set(kernel.writes)) == (reads, writes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("job", "way"), ways.STEPS)
def test_stated_traffic_is_what_pytorch_calls(job, way, dtype):
    numel = 1000
    state = ways.make([numel], dtype)
    step = ways.step(job, way, dtype)
    counted = count.passes(count.count(lambda: step(state)), numel)
    stated = [kernel for phase in JOBS[job][way].of(dtype) for kernel in phase]
    assert [call.read // numel for call in counted] == [k.bytes_read(dtype) for k in stated]
    assert [call.written // numel for call in counted] == [
        k.bytes(dtype) - k.bytes_read(dtype) for k in stated
    ]


@pytest.mark.parametrize("way", ["eager, in place", "eager autograd", "torch._foreach", "mas_ext"])
def test_stated_launches_are_the_calls_that_pytorch_makes(way):
    job, sizes = "add_penalty_grad_", [100] * 7
    state = ways.make(sizes, "float32")
    counted = count.passes(count.count(lambda: ways.step(job, way, "float32")(state)), 100)
    stated = launches.launches(JOBS[job][way], "float32", sizes, H100, cache=0)
    kernels = sum(launch.count for launch in stated if launch.elements >= 100)
    assert kernels == len(counted)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("mas_ext", (20, 40, 12)),
        ("torch.compile, flat", (20, 40, 12)),
        ("eager, in place", (44, 88, 34)),
        ("torch._foreach", (52, 104, 30)),
        ("eager autograd", (84, 168, 58)),
    ],
)
def test_bytes_of_an_element_that_the_readme_states(way, expected):
    way = JOBS["add_penalty_grad_"][way]
    assert tuple(way.bytes(dtype) for dtype in ("float32", "float64", "bfloat16")) == expected


@pytest.mark.parametrize(("job", "expected"), [("penalty", 12), ("proximal_step_", 16)])
def test_bytes_of_our_other_operators(job, expected):
    assert JOBS[job]["mas_ext"].bytes("float32") == expected


def test_what_counts_as_read_and_written():
    x, y = torch.ones(100), torch.ones(1).expand(100)
    calls = count.count(lambda: (x.add_(y), x * x, x.view(10, 10), x + 1))
    assert [(call.read, call.written) for call in calls] == [(404, 400), (400, 400), (400, 400)]


# ================================================================================================
# Launches
# ================================================================================================
@pytest.mark.parametrize(("streams", "capacity"), [(2, 896), (3, 716), (4, 597)])
def test_a_launch_of_ours_takes_as_many_tensors_as_its_table(streams, capacity):
    assert launches.table_capacity(streams) == capacity
    assert launches.tables(capacity, streams) == 1
    assert launches.tables(capacity + 1, streams) == 2


def test_a_penalty_is_two_launches_and_more_beyond_a_table():
    def kernels(tensors: int) -> int:
        return predict("add_penalty_grad_", "mas_ext", "float32", [64] * tensors, H100).launches

    assert [kernels(n) for n in (1, 597, 598)] == [2, 2, 3]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([1] * 336, 1),
        ([1] * 337, 2),
        ([65536 * 2240], 1),
        ([65536 * 2240 + 1], 2),
        ([65536 * 2240, 1], 2),
        ([65536] * 336 + [65536 * 3], 2),
        ([65536 * 2241] + [1] * 336, 3),  # what is left of a tensor counts as one
    ],
)
def test_foreach_launches_when_its_argument_is_full(sizes, expected):
    assert launches.foreach_launches(sizes, lists=3) == expected


def test_foreach_before_cuda_13_launches_more_often():
    assert launches.foreach_launches([1] * 100, lists=3, cuda=12) == 3
    assert launches.foreach_launches([65536 * 321], lists=3, cuda=12) == 2


@pytest.mark.skipif(
    torch.__version__ < "2.14", reason="inductor.py knows the internals of torch 2.14"
)
def test_compiled_traffic_is_that_of_inductors_code():
    pytest.importorskip("triton")
    from benchmarks.predict import inductor

    flat = "torch.compile, flat"
    for job, numel in (
        ("accumulate_importance_", 4097),
        *(
            (job, numel)
            for job in ("add_penalty_grad_", "proximal_step_")
            for numel in (4097, 8193, 36_864, 2**23, 25_557_032, 2**26, 2**28 + 2)
        ),
    ):
        generated = inductor.kernels(job, "bfloat16", [numel])
        stated = launches.launches(JOBS[job][flat], "bfloat16", [numel], H100, cache=0)
        moved = [k.elements * (k.read + k.written) for k in generated]
        # A sum that is not cut evenly has a few elements more, which it does not read.
        assert moved == pytest.approx([k.moved for k in stated], rel=1e-3), (job, numel)


# ================================================================================================
# The time that follows
# ================================================================================================
def test_a_large_model_takes_its_bytes_over_the_bandwidth():
    numel = 10**9
    predicted = predict("add_penalty_grad_", "mas_ext", "float32", evenly(numel, 200), H100)
    exact = 20 * numel / (0.90 * 3.35e12)
    assert predicted.bound == "memory"
    assert predicted.flops == 7 * numel
    assert predicted.seconds == pytest.approx(exact, rel=0.01)
    assert predicted.low < predicted.seconds < predicted.high


def test_a_measured_bandwidth_is_taken_as_it_is():
    gpu = H100.with_bandwidth(1e12)
    predicted = predict("penalty", "mas_ext", "float32", [10**9], gpu)
    assert predicted.seconds == pytest.approx(12e9 / 1e12, rel=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("job", JOBS)
def test_nobody_is_predicted_to_be_faster_than_one_pass(job, dtype):
    sizes = evenly(10**9, 200)
    ours, *others = (predict(job, way, dtype, sizes, H100).device_seconds for way in JOBS[job])
    assert all(ours <= 1.01 * other for other in others)


def test_the_host_bounds_many_small_tensors():
    for way in ("mas_ext", "eager, in place", "eager autograd"):
        predicted = predict("add_penalty_grad_", way, "float32", [64] * 1000, H100)
        assert predicted.bound == "host"
        assert predicted.seconds == predicted.host_seconds > predicted.device_seconds


def test_a_small_model_stays_in_the_cache_between_calls_only():
    def missed(is_warm: bool) -> float:
        sizes = [10**6]
        return predict(
            "add_penalty_grad_", "mas_ext", "float32", sizes, H100, is_warm=is_warm
        ).missed_bytes

    assert missed(is_warm=True) == 0
    assert missed(is_warm=False) == pytest.approx(20e6, rel=0.01)


def test_temporaries_of_small_tensors_stay_in_the_cache_and_of_large_ones_do_not():
    def missed(numel: int) -> float:
        sizes = [numel] * (10**9 // numel)
        return predict("add_penalty_grad_", "eager, in place", "float32", sizes, H100).missed_bytes

    assert missed(10**5) / 10**9 == pytest.approx(20, rel=0.01)
    assert missed(10**8) / 10**9 == pytest.approx(44, rel=0.01)


def test_too_few_blocks_do_not_get_the_whole_bandwidth():
    """One chunk of foreach is 65,536 elements; one of ours an eighth of that."""
    foreach, ours = (
        predict("accumulate_importance_", way, "float32", [65536], H100, is_warm=False)
        for way in ("torch._foreach", "mas_ext")
    )
    assert foreach.bound == "latency"
    assert foreach.device_seconds > 4 * ours.device_seconds


def test_more_bandwidth_is_never_slower():
    for job, done in JOBS.items():
        for way in done:
            slow, fast = (
                predict(job, way, "float32", evenly(10**8, 100), H100.with_bandwidth(b)).seconds
                for b in (1e12, 2e12)
            )
            assert fast <= slow, (job, way)


def test_memory_counts_what_outlives_a_phase():
    def memory(way: str) -> float:
        return predict("add_penalty_grad_", way, "float32", [10**6] * 10, H100).memory / 10**7

    assert memory("mas_ext") == 16
    assert memory("torch._foreach") == 20
    assert memory("eager, in place") == pytest.approx(16.4)


# ================================================================================================
# abs_matmul
# ================================================================================================
def test_abs_matmul_counts_the_benchmarks_flops():
    case = measured_abs_matmul.CASES[0]
    problem = Problem(measured_abs_matmul.SAMPLES, case.positions, case.p, case.d)
    assert predict_abs_matmul("mas_ext", "float32", problem, H100).flops == case.flops


def test_positions_are_padded_on_tensor_cores_only():
    def roof(dtype: str, positions: int, name: str) -> float:
        return abs_matmul.our_roofs(dtype, Problem(32, positions, 512, 512), H100)[name]

    assert roof("bfloat16", 17, "tensor cores") == roof("bfloat16", 32, "tensor cores")
    assert roof("float32", 17, "multiply-adds") == pytest.approx(
        17 / 32 * roof("float32", 32, "multiply-adds")
    )


def test_one_sample_of_few_tiles_leaves_most_of_the_device_idle():
    one, many = (
        abs_matmul.our_roofs("float32", Problem(1, 256, p, 64), H100)["multiply-adds"]
        for p in (64, 64 * H100.sms)
    )
    assert one == many


def test_few_tiles_deal_out_their_samples():
    one, many = (Problem(samples, 256, 64, 64) for samples in (1, 32))
    assert (one.parts, many.parts) == (1, 32)
    roofs = [abs_matmul.our_roofs("float32", problem, H100) for problem in (one, many)]
    assert roofs[0]["multiply-adds"] == roofs[1]["multiply-adds"]
    assert roofs[0]["memory"] < roofs[1]["memory"]


@pytest.mark.parametrize(
    ("problem", "parts"),
    [
        (Problem(1000, 1, 64, 64), 7),  # by what a part is worth
        (Problem(3, 1000, 64, 64), 3),  # by the samples
        (Problem(1000, 1000, 64, 64 * 100), 5),  # by the blocks
        (Problem(1000, 1000, 64 * 23, 64 * 23), 1),
    ],
)
def test_parts_are_what_the_problem_allows(problem, parts):
    assert problem.parts == parts


def test_one_tile_of_float32_an_sm_keeps_half_of_its_schedulers_busy():
    one, two = (
        abs_matmul.our_roofs("float32", Problem(1, 256, 64, 64 * n * H100.sms), H100)
        for n in (1, 2)
    )
    assert one["multiply-adds"] == two["multiply-adds"]


def test_with_one_position_the_samples_are_the_positions_of_one():
    one, many = (
        abs_matmul.our_roofs("bfloat16", problem, H100)
        for problem in (Problem(32, 1, 512, 512), Problem(1, 32, 512, 512))
    )
    assert one == many


def test_a_full_device_needs_flops_over_the_peak():
    problem = Problem(32, 256, 64 * 24, 64 * 11)  # two tiles for each of 132 SMs
    roofs = abs_matmul.our_roofs("float32", problem, H100)
    assert roofs["multiply-adds"] == pytest.approx(problem.flops / H100.fp32)


def test_a_tile_of_bfloat16_is_32_flops_a_byte_of_l2():
    problem = Problem(8, 1024, 4096, 4096)
    roofs = abs_matmul.our_roofs("bfloat16", problem, H100)
    assert roofs["L2"] == pytest.approx(problem.flops / 32 / (24 * H100.sms * H100.clock))
    assert max(roofs, key=roofs.__getitem__) == "L2"


# ================================================================================================
# What is published
# ================================================================================================
def _published() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks/results/predict.json").read_text())


@pytest.mark.parametrize(("name", "parameters"), [("1b", 1_235_814_400), ("7b", 6_738_415_616)])
def test_large_models_have_their_parameters(name, parameters):
    assert sum(LARGE[name].numels) == parameters


@pytest.mark.parametrize("name", LARGE)
def test_published_predictions_are_the_models(name):
    """If not: python -m benchmarks predict --out benchmarks/results, and the README's tables."""
    published = _published()["gpus"]["h100"]["jobs"]
    for job, done in JOBS.items():
        for way in done:
            now = predict(job, way, "float32", LARGE[name].numels, H100)
            then = published[job][name]["float32"][way]
            assert then["seconds"] == pytest.approx(now.seconds, rel=1e-3), (job, way)


def test_published_products_are_the_models():
    for row in _published()["gpus"]["h100"]["accumulate_abs_matmul_"]:
        problem = Problem(*(row[key] for key in ("samples", "positions", "p", "d")))
        for dtype in ("float32", "bfloat16"):
            now = predict_abs_matmul("mas_ext", dtype, problem, H100)
            assert row[dtype]["mas_ext"]["seconds"] == pytest.approx(now.seconds, rel=1e-3)


def test_what_is_published_says_that_it_is_predicted():
    assert "PREDICTED" in _published()["what"]


# ================================================================================================
# What a run on a GPU calls
# ================================================================================================
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("h200", "h200"),
    ],
)
def test_gpus_are_found_by_the_drivers_name(name, key):
    assert find_gpu(name) is GPUS[key]


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA RTX 4090 D", ""])
def test_other_gpus_are_not_taken_for_those_we_know(name):
    assert find_gpu(name) is None
    with pytest.raises(ValueError, match="no data sheet"):
        predict("penalty", "mas_ext", "float32", [1], name)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
def test_data_sheets_are_plausible(gpu):
    assert 1.4e9 < gpu.clock < 2.7e9
    assert 5 < gpu.fp32 / gpu.bandwidth < 110
    assert gpu.tensor_bf16 > gpu.fp32
    assert gpu.source


def test_evenly_makes_the_sizes_asked_for():
    assert evenly(10, 3) == [4, 3, 3]
    with pytest.raises(ValueError, match="do not make"):
        evenly(2, 3)


def test_the_model_needs_the_standard_library_only():
    code = (
        "import sys; import benchmarks.predict as p;"
        "print(p.predict('penalty', 'mas_ext', 'float32', [10**6], 'h100'));"
        "bad = {'torch', 'rich', 'matplotlib', 'numpy'} & set(sys.modules); assert not bad, bad"
    )
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "predicted" in run.stdout


def test_every_figure_says_that_it_is_predicted():
    problem = Problem(32, 16, 512, 512)
    for prediction in (
        predict("penalty", "mas_ext", "float32", [1000], H100),
        predict_abs_matmul("mas_ext", "float32", problem, H100),
    ):
        assert "predicted" in str(prediction)


# -- large models ----------------------------------------------------------------------------------


def test_the_page_on_large_models_has_the_tables_of_its_command():
    text = large.PAGE.read_text("utf-8")
    assert large.rewritten(text) == text
    assert large.TABLES.keys() == set(re.findall(r"<!-- (\w+) -->\n.*?<!-- end -->", text, re.S))


@pytest.mark.parametrize(
    ("model", "published"), list(zip(large.MODELS, (6_738_415_616, 68_976_648_192), strict=True))
)
def test_the_large_models_have_the_published_number_of_parameters(model, published):
    assert model.parameters == published
