from setuptools import setup

setup()  # the metadata lives in pyproject.toml
