"""Every op that is registered is in the list of a family that opchecks it."""

from __future__ import annotations

import covariance.test_library
import head_fisher.test_library
import torch

import softmax_fisher.test_library


def test_every_registered_op_is_checked() -> None:
    registered = {
        str(schema).partition("(")[0].removeprefix("fisherkern::")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fisherkern::")
    }
    families = (softmax_fisher, head_fisher, covariance)
    checked = {name for family in families for name in family.test_library.NAMES}
    assert registered == checked
