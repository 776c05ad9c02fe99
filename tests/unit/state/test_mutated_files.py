"""Files with faults in them: an error that changes nothing, or what the file holds, checked.

``python -m tests.fuzz`` loads many more.
"""

from importlib.util import find_spec

import pytest

from tests import fuzz

NEEDS_PEFT = {"adapters"}  # whose import alone takes seconds
EACH = 30


def test_a_file_with_faults_is_refused_or_gives_what_it_holds():
    names = [name for name in fuzz.LOADERS if name not in NEEDS_PEFT]
    report = fuzz.report_of([(name, 0, EACH) for name in names])
    assert not report.failures, str(report)
    assert sum(results.total() for results in report.results.values()) == EACH * len(names)


@pytest.mark.slow
def test_many_files_with_faults_are_refused_or_give_what_they_hold():
    names = [name for name in fuzz.LOADERS if name not in NEEDS_PEFT or find_spec("peft")]
    report = fuzz.report_of([(name, EACH, 300) for name in names])
    assert not report.failures, str(report)
