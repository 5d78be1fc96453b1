"""Metadata lives in pyproject.toml; this file is where the native build will hook in."""

from setuptools import setup

setup()
