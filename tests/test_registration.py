"""Every op that is registered is in the list of a family that opchecks it."""

from __future__ import annotations

import covariance.test_library
import torch

import softmax_fisher.test_library


def test_every_registered_op_is_checked() -> None:
    registered = {
        str(schema).partition("(")[0].removeprefix("fisherkern::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fisherkern::")
    }
    checked = {*softmax_fisher.test_library.NAMES, *covariance.test_library.NAMES}
    assert registered == checked
