"""What is installed, what was built, for which torch, and why something is missing."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fisherkern import backends


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _extension() -> list[str]:
    module, reason = backends.extension()
    if module is None:
        return [f"C++ extension: none: {reason}"]
    built = module.build_info()
    architectures = ", ".join(built["cuda_architectures"]) or "none (built without CUDA sources)"
    return [
        f"C++ extension: built by {built['compiler']} against torch {built['torch']}",
        f"  CPU: {', '.join(built['cpu_capabilities'])}; in use: {module.cpu_capability()}",
        f"  CUDA architectures: {architectures}",
    ]


def _serves(device: str) -> str:
    lines = []
    for name in backends.NAMES:
        reason = backends.reason_against(name, device, torch.float32)
        lines.append(f"  {name}: {reason or 'yes'}")
    return "\n".join(lines)


def describe() -> str:
    """The report that ``python -m fisherkern.info`` prints, one fact per line.

    Looks for a CUDA device, so it may initialise CUDA; importing fisherkern does not.

    >>> import fisherkern.info
    >>> "CPU tensors are served by" in fisherkern.info.describe()
    True
    """
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else "none found"
    triton = "found" if importlib.util.find_spec("triton") else "not installed"
    return "\n".join(
        [
            f"fisherkern {_version('fisherkern')}, Python {platform.python_version()}",
            f"torch {torch.__version__} (CUDA {torch.version.cuda or 'not built in'}), "
            f"triton {_version('triton') if triton == 'found' else triton}",
            f"CUDA device: {device}",
            *_extension(),
            f"CPU tensors are served by: {', '.join(backends.available('cpu'))}",
            _serves("cpu"),
            f"CUDA tensors would be served by: {', '.join(backends.available('cuda'))}",
            _serves("cuda"),
        ]
    )


def main() -> int:
    """Print :func:`describe`."""
    print(describe())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
