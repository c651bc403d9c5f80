"""Tests of what needs an extra are collected where its packages are: `make check` installs them all."""

from importlib.util import find_spec

NEEDS = {
    "test_formulas.py": ("latex2mathml",),
    "test_hf_trainer.py": ("transformers", "accelerate"),
    "test_lightning_loop.py": ("lightning",),
    "test_schema.py": ("jsonschema",),
}

collect_ignore = [file for file, packages in NEEDS.items() if not all(map(find_spec, packages))]
