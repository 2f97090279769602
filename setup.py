"""Builds fisherkern._C with ninja; see CONTRIBUTING.md. Everything else is in pyproject.toml.

FISHERKERN_CUDA  auto (CUDA sources join where nvcc and a CUDA torch are found), 0, 1 (fail without
                 them), link (nvcc alone is enough: everything is compiled and linked, for testing)
FISHERKERN_CPP   auto (no compiler: a pure-Python package, said once), 0, 1 (fail without one)
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX (also `ccache g++`), CUDA_HOME as everywhere else.
"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from csrc import build


class BuildExtension(build_ext):
    """Drives ninja, whose objects stay in build/ between builds."""

    def run(self) -> None:
        """Build, or say once why there is nothing to build with."""
        reason = build.reason_against()
        if reason:
            print(f"fisherkern: C++ extension left out, the package works without it: {reason}")
            self.extensions: list[Extension] = []
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        """Build the one extension."""
        build.extension(Path(self.get_ext_fullpath(ext.name)))


setup(
    ext_modules=[Extension("fisherkern._C", sources=[])],
    cmdclass={"build_ext": BuildExtension},
)
