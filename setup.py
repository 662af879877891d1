"""What pyproject.toml cannot say: the packages found here, and tune_configs/ shipped as ``rayft.configs``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rayft", "rayft.*", "envs", "envs.*"]), "rayft.configs"],
    package_dir={"rayft.configs": "tune_configs"},
)
