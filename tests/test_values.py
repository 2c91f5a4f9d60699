"""Numbers of NumPy and torch in arguments, and settings that are read before torch is imported."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import stagedspec
from stagedspec import TreeConfig
from stagedspec.values import at_least, plain, real, truth, whole

WHOLE = [3, np.int64(3), np.uint8(3), np.int32(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
NOT_WHOLE = [None, True, np.True_, torch.tensor(True), 3.0, np.float64(3), torch.tensor(3.0), "3", b"3", [3], {}, 3j]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_whole_numbers(value):
    assert type(whole(value)) is int and whole(value) == at_least("it", value, 3) == 3
    assert type(plain(value)) is int and type(real(value)) is float and real(value) == 3.0
    with pytest.raises(ValueError, match=r"it must be a whole number of at least 4, got .*3"):
        at_least("it", value, 4)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_what_is_no_whole_number(value):
    assert whole(value) is None
    with pytest.raises(ValueError, match="it must be a whole number of at least 1, got "):
        at_least("it", value)


def test_real_numbers():
    for value in (0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), torch.tensor(0.5), np.array(0.5)):
        assert type(real(value)) is float and real(value) == 0.5
    for value in (None, True, np.False_, torch.tensor(True), "0.5", b"0.5", 1j, [0.5], torch.ones(2), 10**400):
        assert real(value) is None, value
    assert math.isnan(real(math.nan))


def test_truth():
    for value in (True, np.True_, torch.tensor(True), 1, np.int64(1)):
        assert truth("it", value) is True
    for value in (False, np.False_, None, 0, torch.tensor(0)):
        assert truth("it", value) is False
    for value in (2, 0.5, "yes", [], -1):
        with pytest.raises(ValueError, match="it must be True or False, got "):
            truth("it", value)


def test_plain_values():
    given = [np.int64(1), (torch.tensor([2, 3]), np.array([0.5])), "text", None]
    assert plain(given) == [1, ([2, 3], [0.5]), "text", None]


def test_trees_take_numbers_of_any_kind():
    tree = TreeConfig(np.int64(8), torch.tensor(3), np.uint8(2), node_floor=np.float32(0.5), context=np.False_)
    assert tree == TreeConfig(8, 3, 2, node_floor=0.5, context=False)
    assert {type(value) for value in vars(tree).values()} == {int, float, bool}


def test_settings_need_no_torch():
    """The command line checks them before anything large is imported."""
    program = (
        "import sys, types\n"
        "sys.modules.update(torch=None, numpy=None, transformers=None)\n"
        "package = sys.modules['stagedspec'] = types.ModuleType('stagedspec')\n"
        "package.__path__ = [sys.argv[1]]\n"
        "from stagedspec.decoding.sampling import Sampling\n"
        "from stagedspec.planning.tree import TreeConfig\n"
        "Sampling(True, 0.5, 3), TreeConfig()"
    )
    subprocess.run([sys.executable, "-c", program, str(Path(stagedspec.__file__).parent)], check=True)
