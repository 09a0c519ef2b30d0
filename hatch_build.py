"""Build hook: compiles the kernels into the wheel where a C++ compiler is; without one the wheel holds Python alone."""

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class KernelsHook(BuildHookInterface[Any]):
    """Runs `poolhouse.kernels.build` from the sources."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """version: "standard" or "editable"."""
        path = Path(self.root, "src", "poolhouse", "kernels", "build.py")
        spec = importlib.util.spec_from_file_location("kernels_build", path)
        assert spec is not None
        assert spec.loader is not None
        kernels = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(kernels)
        try:
            kernels.build()
        except (kernels.BuildError, OSError) as error:
            self.app.display_warning(f"Without compiled kernels: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
