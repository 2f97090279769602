"""The bench of capture: both write the same factors, and memory is counted beyond them."""

from __future__ import annotations

import pytest
import tiny_llama
import torch

from fisherkern.bench import capture


@pytest.fixture(scope="module")
def passes():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = transformers.LlamaForCausalLM(tiny_llama.config())
    return capture.Passes(network, torch.randint(0, 13, (2, 9)))


def test_both_capture_the_same_factors(passes):
    found = capture.timed(passes, 1)
    assert found["layers"] == len(passes.ours.layers) > 1
    assert found["difference"] < 1e-5
    name = next(iter(passes.layers))
    passes.plain.factors[name, "G"] *= 1.01
    assert passes.difference() > 1e-3


def test_factor_bytes_are_those_of_the_averages(passes):
    held = [x.state_dict()["sum"] for y in passes.ours.layers.values() for x in y.averages.values()]
    assert passes.factor_bytes() == sum(x.numel() * x.element_size() for x in held)


def test_memory_is_beyond_a_bare_pass_and_the_factors():
    mib = 2**20
    found = {
        "layers": 3,
        "seconds": {capture.BARE: [1.0], capture.PLAIN: [3.0], capture.OURS: [2.0]},
        "difference": 1e-7,
        "factor_bytes": 100 * mib,
        "peak_bytes": {
            "malloc": {
                capture.BARE: 500 * mib,
                capture.PLAIN: 675 * mib,
                capture.OURS: 612 * mib,
            }
        },
    }
    text = capture.table(found)
    assert "| malloc | 500 | 75 | 12 |" in text
    assert "2.00 times faster" in text
