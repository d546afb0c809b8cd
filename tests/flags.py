"""Parses --config and its overrides as the entry points do."""

import sys

import ml_collections
from absl import flags

from spg_jax.method import complete
from spg_jax.process import config_flag


def parse_config(
    monkeypatch, *arguments: str
) -> tuple[ml_collections.ConfigDict, config_flag.Sources]:
    """The configuration of a command line, and where its values come from."""
    values, command = flags.FlagValues(), ['program', *arguments]
    monkeypatch.setattr(flags, 'FLAGS', values)
    monkeypatch.setattr(sys, 'argv', command)
    config_flag.define_config_flag(complete)
    values(command)
    return values.config, config_flag.sources()
