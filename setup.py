"""Package metadata.

Two package roots, named one by one: `sgtm` at the top and `sgtm_kernels` inside `kernels/`. The folder `kernels/`
itself must never become a package: Hugging Face publishes one of that name, which `transformers` imports where it is.
`tests/processes/test_package.py` looks into the built wheel.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "sgtm" / "__init__.py").read_text()).group(1)

setup(
    name="sgtm",
    version=VERSION,
    description="Distributed pretraining with Selective GradienT Masking: one run, a full model and a safe one",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.13",
    packages=[
        *find_packages(".", include=["sgtm", "sgtm.*"]),
        *find_packages("kernels", include=["sgtm_kernels", "sgtm_kernels.*"]),
    ],
    package_dir={"sgtm": "sgtm", "sgtm_kernels": "kernels/sgtm_kernels"},
    package_data={
        "sgtm": ["py.typed"],
        "sgtm.config": ["presets/*.yaml"],
        "sgtm.data.stories": ["*.yaml"],
        "sgtm.demo": ["*.j2"],
        "sgtm.report": ["*.j2"],
        "sgtm.sweep": ["*.j2"],
        "sgtm.report.baselines": ["*.json"],
        "sgtm_kernels": ["py.typed", "tuned/*"],
    },
    entry_points={"console_scripts": ["sgtm = sgtm.__main__:run"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19,<0.20",
        "transformers>=5",
        "tokenizers>=0.22",
        "datasets>=4",
        "pyarrow>=18",
        "safetensors>=0.6",
        "zstandard>=0.23",
        "numpy>=2",
        "pydantic>=2.10",
        "pyyaml>=6",
        "rich>=13",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "psutil>=6",
        "wandb>=0.20",
    ],
    extras_require={
        "trainer": ["accelerate>=1.10"],  # of Hugging Face's Trainer: docs/integrations.md
        "torchtitan": ['torchtitan==0.3.*; python_version >= "3.11"'],  # docs/integrations.md
        "dev": [
            "accelerate>=1.10",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.12",
            "codespell>=2.3",
            "mypy>=2",
            "types-psutil",
            "types-PyYAML",
            "setuptools>=77",
            "scikit-learn>=1.5",  # of examples/classifier
            'triton>=3.6; platform_system == "Linux"',  # its interpreter and its compiler, which need no GPU
        ],
    },
)
