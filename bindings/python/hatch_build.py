"""Puts the library into the wheel: the file named by CP_LIB, or a release build by cargo of the checkout that this folder is in."""

import os
import subprocess
import sysconfig
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "editable":
            return  # The package finds target/ by itself.
        library = os.environ.get("CP_LIB")
        if not library:
            root = Path(self.root).parents[1]
            subprocess.run(["cargo", "build", "--release", "--lib"], cwd=root, check=True)
            library = root / "target" / "release" / "libcontext_parallel.so"
        build_data["force_include"][str(library)] = "context_parallel/lib/libcontext_parallel.so"
        build_data["pure_python"] = False
        # Any Python 3; the platform is that of this machine.
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
