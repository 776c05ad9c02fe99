"""States that are spread over processes: saved and loaded by any number of them, to the bit."""

import warnings

import pytest
import torch.distributed.checkpoint as dcp

from mas_ext import MAS
from tests.distributed import checkpoints, launch


@pytest.fixture
def shared(tmp_path):
    """What one process saved: a plain file, and both of the library's formats."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in checkpoints.DTYPES:
        model, mas = checkpoints.original(name)
        mas.save(folder / f"{name}.file")
        for form, writer in checkpoints.WRITERS.items():
            path = folder / f"{name}-{form}-of-1.dcp"
            save({"model": model, "mas": mas}, storage_writer=writer(str(path)))
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def save(state, **how):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(state, **how)


def run(ranks, folder, program="checkpoints"):
    own = folder / f"ranks{ranks}"
    own.mkdir()
    found = launch.run([program], ranks, own)
    assert found
    assert not any(found.values()), "\n".join(line for lines in found.values() for line in lines)


def load_all_on_one_process(shared):
    folders = sorted(shared.glob("*.dcp"))
    for folder in folders:
        name, form = folder.name.split("-")[:2]
        model, mas = checkpoints.fresh(name, lambda model: model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader = checkpoints.READERS[form](str(folder))
            dcp.load({"model": model, "mas": mas}, storage_reader=reader)
        checkpoints.assert_is_original(mas, shared / f"{name}.file")
    return len(folders)


def test_one_and_two_processes_load_what_the_other_saved(tmp_path, shared):
    run(2, tmp_path)
    assert load_all_on_one_process(shared) == 4 + 2 * 4


@pytest.mark.slow
def test_one_two_and_four_processes_load_what_any_other_saved(tmp_path, shared):
    run(2, tmp_path)
    run(4, tmp_path)
    assert load_all_on_one_process(shared) == 4 + 2 * 4 + 3 * 4
    (tmp_path / "ranks2").rename(tmp_path / "before")
    run(2, tmp_path, "checkpoints:check_loading_what_others_saved")  # of what four saved


def test_a_state_without_its_tensors_is_refused():
    _, mas = checkpoints.original("float32")
    state = mas.state_dict()
    for key in ("settings", "counts"):
        with pytest.raises(ValueError, match="damaged"):
            MAS(checkpoints.net()).load_state_dict({**state, key: state["counts"][:1]})
