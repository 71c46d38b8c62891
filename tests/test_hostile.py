"""A sample of what ``scripts/hostile.py`` does: damaged files end in one line, or are read."""

import importlib.util
import sys
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[1] / "scripts" / "hostile.py"


@pytest.fixture(scope="module")
def hostile():
    spec = importlib.util.spec_from_file_location("hostile", PLACE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile"] = module
    spec.loader.exec_module(module)
    return module


def judged(outcomes):
    wrong = [(o.file, o.damage, o.wrong, o.said[-300:]) for o in outcomes if o.wrong]
    assert not wrong, wrong


# A fork of a process that has threads warns.
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_sample_of_damaged_files_ends_in_a_line_each(hostile):
    judged(hostile.cases(12, seed=5))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_thousand_damaged_files_end_in_a_line_each(hostile):
    judged(hostile.cases(1000, seed=6))
