"""The parts of the kit that lie beside the package in the repository go into the wheel, as kdiga_nb/kit/."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PARTS = ("notebooks", "params", "published")
DRAWN = shutil.ignore_patterns("*.png", "*.svg", ".ipynb_checkpoints")  # an installed kit draws its own figures


class WithKit(build_py):
    """Also copy the parts, unless the installation is editable: then they are found where they are."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for part in PARTS:
                target = Path(self.build_lib) / "kdiga_nb" / "kit" / part
                shutil.copytree(part, target, ignore=DRAWN, dirs_exist_ok=True)


setup(cmdclass={"build_py": WithKit})
