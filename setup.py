"""What pyproject.toml cannot say: the folder recipes/ is installed as etpp_ssl/recipes."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["etpp_ssl*"]), "etpp_ssl.recipes"],
    package_dir={"etpp_ssl.recipes": "recipes"},
)
