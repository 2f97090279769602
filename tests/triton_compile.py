"""Compile Triton kernels for GPUs that are not here, and list what there is to compile.

Each kernel module has a tuple ``AOT`` of (kernel, family, constexpr variants) beside its kernels.
The family is one of `_config.LAUNCHES`, where a constant may be a function of the rule; one of
`_covariance_config.LAUNCHES`, whose kernels compute tiles of a matrix; one of
`_factor_config.LAUNCHES`, whose kernels multiply blocks of columns; or None, where a variant
holds every constant and may hold the number of warps. Types follow from the names of arguments, so
a new argument without a type fails loudly. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import itertools
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fisherkern.kernels
from fisherkern.kernels import _config, _covariance_config, _factor_config

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
# Largest shared memory of a block, in bytes.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}

# Pointers to rows take the type of the logits; the rest is fixed by the calling convention.
_ROWS = {"z_ptr", "v_ptr", "g_ptr", "out_ptr", "x_ptr"}
_FLOATS = {
    "partial_ptr",
    "state_ptr",
    "stats_ptr",
    "grad_ptr",
    "weights_ptr",
    "lse_ptr",
    "alpha_ptr",
    "reference_ptr",
    "unit_ptr",
    "scale_ptr",
    "at_label_ptr",
    "y_ptr",
    "c_ptr",
    "y_scale_ptr",
}
_TYPES = {"mask_ptr": "*i1", "labels_ptr": "*i64", "seed_ptr": "*i64"}
_TYPES |= dict.fromkeys(_FLOATS, "*fp32")
_TYPES |= dict.fromkeys(("scale", "scale_low", "alpha", "beta", "beta_low"), "fp32")
_SIZES = {
    "inner",
    "classes",
    "tokens",
    "tokens_per_split",
    "splits",
    "classes_per_split",
    "directions",
    "pairs",
    "width",
    "height",
    "size",
    "rows",
    "columns",
    "blocks",
    "groups",
    "group_tokens",
    "groups_per_split",
    "samples",
    "sample_tokens",
    "samples_per_split",
    "g_token_inner",
}
_STRIDE = re.compile(
    r"(z|v|g|x|y|c|out|factor|terms)_(outer|inner|direction|head|row|column|split|plane)"
)
# Sizes that a launch finds divisible by 16 where the rows are aligned.
_ROW_LENGTHS = {"classes", "width", "height"}
# Those of a block of columns beside the logits, which may be aligned where the other is not.
_BLOCK_LENGTHS = {"width", "y_row", "c_row", "out_row", "out_split"}
# Kernels whose `out` is not a row of the dtype of the logits.
_FLOAT_OUTPUT = {
    "quadratic_kernel",
    "statistics_kernel",
    "merge_statistics_kernel",
    "add_splits_kernel",
    "panel_kernel",
    "project_kernel",
    "expand_kernel",
}


class Operands(NamedTuple):
    """What a launch specialises on: dtype, alignment of rows, and which operands are None."""

    dtype: str
    aligned: bool
    absent: tuple[str, ...]
    unit: bool = False
    """Every size and stride is 1, which a launch turns into a constant."""
    factor: str = "fp32"
    flat: bool = False
    """Tokens lie at one distance from each other: their inner size is 1."""
    ragged: bool = False
    """Blocks of columns beside the logits are not aligned, although these are."""

    def __str__(self) -> str:
        absent = "".join(f"-no-{name.removesuffix('_ptr')}" for name in self.absent)
        names = [name for name in ("aligned", "unit", "flat", "ragged") if getattr(self, name)]
        return f"{'-'.join((self.dtype, *names))}{absent}-factor-{self.factor}"


# Aligned rows load 16 bytes at once and take the most registers; 50257 classes are not aligned.
OPERANDS = (
    Operands("bf16", True, ("lse_ptr",)),
    Operands("fp32", True, ("lse_ptr",)),
    Operands("fp16", False, ("weights_ptr", "mask_ptr")),
)
UNIT = Operands("fp32", False, ("lse_ptr",), unit=True)

# Factors: with few tiles the sums go to partials; float64 takes the most registers.
_PLAIN = ("mask_ptr", "weights_ptr", "partial_ptr")
_MASKED = ("weights_ptr",)
_DOUBLE = ("weights_ptr", "partial_ptr")
_WEIGHTED = ("mask_ptr", "partial_ptr")
# Sums of columns and of splits: no tiles, and one configuration.
_SUM_OPERANDS = (
    Operands("bf16", True, ("mask_ptr",), flat=True),
    Operands("fp32", True, ("weights_ptr",), factor="fp64"),
    Operands("fp16", False, ("mask_ptr", "weights_ptr")),
)


def _tile_operands(family: str, key: str) -> Iterator[Operands]:
    """What the host launches with this entry: see `_covariance_config.arithmetic_of`."""
    aligned = not key.endswith("unaligned")
    if key in ("half", "bf16x6"):
        # sums that go to partials: how they are stored does not depend on what they are of
        yield Operands("bf16" if key == "half" else "fp32", True, _MASKED)
    if key.startswith("half"):
        yield Operands("bf16", aligned, _PLAIN, flat=True)
        # the two halves differ in the names of instructions alone
        yield Operands("fp16" if aligned else "bf16", aligned, _DOUBLE, factor="fp64")
    elif key == "split":
        yield Operands("fp16", True, _WEIGHTED, factor="fp64")
        yield Operands("bf16", False, _WEIGHTED)
    elif not aligned:
        yield Operands("fp32", False, _WEIGHTED, factor="fp64")
    else:
        halves = ("bf16", "fp16") if (family, key) == ("squares", "bf16x6") else ()
        yield Operands("fp32", True, _PLAIN, flat=True)
        for dtype in ("fp32", *halves):
            yield Operands(dtype, True, _WEIGHTED, factor="fp64")
        if f"{key} unaligned" not in _covariance_config.LAUNCHES["sm_90"][family]:
            yield Operands(halves[0] if halves else "fp32", False, _WEIGHTED)
    if key == "ieee":
        yield Operands("fp32", False, _PLAIN, unit=True)


class Case(NamedTuple):
    """One compilation."""

    kernel: Any
    target: str
    operands: Operands
    constants: dict[str, Any]
    warps: int
    stages: int | None = None

    def __str__(self) -> str:
        constants = "-".join(f"{name}{value}" for name, value in self.constants.items())
        name = f"{self.kernel.__name__}-{self.target}-{self.operands}"
        stages = f"-{self.stages}stages" if self.stages else ""
        return f"{name}-{constants}-{self.warps}warps{stages}"


class Report(NamedTuple):
    """What the assembler says of a kernel."""

    registers: int
    spills: int
    stack: int
    shared: int
    wide: bool
    """Whether it loads 16 bytes at once."""
    asynchronous: bool
    """Whether it copies 16 bytes at once to shared memory, past the registers."""
    matrix: tuple[str, ...]
    """Tensor core instructions: wgmma or mma, and the type of the operands."""


def kernel_modules() -> list[ModuleType]:
    """The modules of the back end, host code and helpers included."""
    package = fisherkern.kernels
    found = pkgutil.iter_modules(package.__path__, package.__name__ + ".")
    return [importlib.import_module(info.name) for info in found]


def launched_kernels(module: ModuleType) -> set[str]:
    """Names of what a module launches: every ``name[grid](...)`` in its source."""
    calls = (x for x in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(x, ast.Call))
    launches = (x.func.value for x in calls if isinstance(x.func, ast.Subscript))
    return {x.id for x in launches if isinstance(x, ast.Name)}


def cases() -> Iterator[Case]:
    """Every kernel in every configuration, for both architectures and all three dtypes."""
    for module in kernel_modules():
        for kernel, family, variants in getattr(module, "AOT", ()):
            if family in _covariance_config.LAUNCHES["sm_90"]:
                yield from _tile_cases(kernel, family, variants)
                continue
            if family in _factor_config.LAUNCHES["sm_90"]:
                yield from _block_cases(kernel, family, variants)
                continue
            if "alpha_ptr" in kernel.arg_names or "x_ptr" in kernel.arg_names:
                operands = _SUM_OPERANDS
            else:
                # without logits there is no dtype to vary
                operands = OPERANDS if "z_ptr" in kernel.arg_names else OPERANDS[:1]
            for target in TARGETS:
                launches = list(_launches(target, family, variants))
                for constants, warps in launches:
                    for choice in operands:
                        yield Case(kernel, target, choice, constants, warps)
                yield Case(kernel, target, UNIT, *launches[0])


def _launches(
    target: str, family: str | None, variants: tuple[dict, ...]
) -> Iterator[tuple[dict, int]]:
    for variant in variants:
        if family is None:
            constants = {x: y for x, y in variant.items() if x != "num_warps"}
            yield constants, variant.get("num_warps", 1)
            continue
        for rule in _config.LAUNCHES[target][family]:
            constants = {x: y(rule) if callable(y) else y for x, y in variant.items()}
            yield {**constants, "BLOCK": rule.launch.block}, rule.launch.warps


def _tile_cases(kernel: Any, family: str, variants: tuple[dict, ...]) -> Iterator[Case]:
    """Every launch of a tile kernel that the host can make."""
    for target, variant in itertools.product(TARGETS, variants):
        for key, rules in _covariance_config.LAUNCHES[target][family].items():
            for operands, rule in itertools.product(_tile_operands(family, key), rules):
                block, tokens, warps, stages = rule.launch
                constants = {"ARITHMETIC": key.split()[0], "TOKENS": tokens, "BLOCK": block}
                yield Case(kernel, target, operands, {**constants, **variant}, warps, stages)


def _block_cases(kernel: Any, family: str, variants: tuple[dict, ...]) -> Iterator[Case]:
    """Every launch of a kernel that multiplies blocks of columns, with all operands.

    With fewer it takes fewer registers: that it compiles then is seen once per architecture.
    """
    everything, *others = variants
    least = {"COLUMNS": _factor_config.LEAST_COLUMNS}
    for target in TARGETS:
        for key, rules in _factor_config.LAUNCHES[target][family].items():
            arithmetic, *unaligned = key.split()
            choices = list(_block_operands(arithmetic, bool(unaligned)))
            for columns, launch in rules:
                tile = {"TOKENS": launch.tokens, "CLASSES": launch.classes, "COLUMNS": columns}
                constants = {"ARITHMETIC": arithmetic, **tile}
                rest = launch.warps, launch.stages
                for operands in choices:
                    yield Case(kernel, target, operands, {**constants, **everything}, *rest)
                if (columns, launch) == rules[0]:
                    few = {**constants, **least}
                    yield Case(kernel, target, choices[0], {**few, **everything}, *rest)
                    if key == "bf16x6":
                        yield Case(kernel, target, UNIT, {**few, **everything}, *rest)
                        for variant in others:
                            yield Case(kernel, target, choices[0], {**constants, **variant}, *rest)


def _block_operands(arithmetic: str, unaligned: bool) -> Iterator[Operands]:
    """What the host launches with this entry; the wider the loads, the more registers."""
    if not unaligned:
        yield Operands("bf16", True, ())
        # 100 columns are not aligned, whatever the rows of logits are
        yield Operands("fp32", True, (), ragged=True)
    if unaligned or arithmetic == "ieee":
        yield Operands("fp16", False, ())
        yield Operands("fp32", False, ())


def _type(kernel: Any, name: str, operands: Operands, constants: dict[str, Any]) -> str:
    if name == "terms_ptr":
        whole = constants.get("ARITHMETIC") == "ieee" or constants.get("TERMS") == 1
        return "*fp32" if whole else "*bf16"
    if name in _ROWS:
        floats = name == "out_ptr" and kernel.__name__ in _FLOAT_OUTPUT
        return "*fp32" if floats else f"*{operands.dtype}"
    if name == "factor_ptr":
        return f"*{operands.factor}"
    if _is_size(name):
        return "i32"
    return _TYPES[name]


def _is_size(name: str) -> bool:
    return name in _SIZES or bool(_STRIDE.fullmatch(name))


def _is_aligned(name: str, kind: str, operands: Operands) -> bool:
    """Whether a launch would find this argument divisible by 16."""
    if kind.startswith("*"):
        return True
    if name in ("classes_per_split", "terms_row", "terms_plane"):  # whole tiles
        return True
    if name in _BLOCK_LENGTHS and operands.ragged:
        return False
    return operands.aligned and bool(name in _ROW_LENGTHS or _STRIDE.fullmatch(name))


def source(case: Case) -> ASTSource:
    """What triton.compile takes: the kernel, specialised as a launch would."""
    names = case.kernel.arg_names
    constants = dict(case.constants)
    # a variant that leaves an operand out needs the others
    if None not in constants.values():
        constants |= {name: None for name in case.operands.absent if name in names}
    if case.operands.unit:
        constants |= {name: 1 for name in names if _is_size(name)}
    if case.operands.flat:
        constants |= {name: 1 for name in ("inner", "g_token_inner") if name in names}
    types = {
        name: "constexpr"
        if name in constants
        else _type(case.kernel, name, case.operands, constants)
        for name in names
    }
    aligned = (
        i
        for i, (name, kind) in enumerate(types.items())
        if kind != "constexpr" and _is_aligned(name, kind, case.operands)
    )
    return ASTSource(
        fn=case.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def compiled(case: Case) -> Report:
    """Compile a case and read the log of the assembler."""
    # a cached kernel has no log
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        log = io.StringIO()
        options = {"num_warps": case.warps, "enable_fp_fusion": True}
        if case.stages:
            options["num_stages"] = case.stages
        with contextlib.redirect_stdout(log):
            kernel = triton.compile(source(case), target=TARGETS[case.target], options=options)

    def figure(pattern: str) -> int:
        found = re.search(pattern, log.getvalue())
        assert found, f"no {pattern!r} in the log of {case}:\n{log.getvalue()}"
        return int(found[1])

    ptx = kernel.asm["ptx"]
    matrix = re.findall(
        r"(wgmma|mma)\.(?:mma_async|sync)\S*?m\d+n\d+k\d+\S*?\.(tf32|bf16|f16)\.", ptx
    )
    return Report(
        registers=figure(r"Used (\d+) registers"),
        spills=figure(r"(\d+) bytes spill stores") + figure(r"(\d+) bytes spill loads"),
        stack=figure(r"(\d+) bytes stack frame"),
        shared=kernel.metadata.shared,
        wide=bool(re.search(r"ld\.global\S*\.v4\.b32", ptx)),
        asynchronous=bool(re.search(r"cp\.async\.c[ga]\S* \[[^]]*\], \[[^]]*\], 0x10", ptx)),
        matrix=tuple(sorted({".".join(found) for found in matrix})),
    )
