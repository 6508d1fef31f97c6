"""The build hook: compiles the CPU kernels into the wheel (or, editable, beside their sources).

Without a compiler the wheel is pure Python, and `evenbits.kernels.report()` says what is missing. With one it is tagged
py3-none-PLATFORM: the library knows neither Python nor torch.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


def _build_module(root: str) -> ModuleType:
    """kernels/cpu/build.py by its path: the package itself cannot be imported, torch may not be there."""
    path = Path(root, "src", "evenbits", "kernels", "cpu", "build.py")
    spec = importlib.util.spec_from_file_location("evenbits_cpu_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class CpuKernels(BuildHookInterface):
    """Hatchling finds this class by its base."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        module = _build_module(self.root)
        # A wheel never carries a library that was lying about: it is built now, or there is none.
        (module.HERE / module.library_name()).unlink(missing_ok=True)
        try:
            library = module.build()
        except module.BuildError as error:
            self.app.display_warning(
                f"evenbits: the CPU kernels were not built: {error}\n"
                "evenbits: it installs without them and runs on torch's own operations, slower. For the fast ones "
                "install a C compiler and reinstall."
            )
            return
        build_data["pure_python"] = False
        build_data["tag"] = module.platform_tag()
        build_data["artifacts"].append(str(library.relative_to(self.root).as_posix()))
