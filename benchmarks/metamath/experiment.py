"""Experiments: a JSON file each, in a folder for each method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.metamath.settings import ExperimentError, Settings, check_names

EXPERIMENTS = Path(__file__).with_name("experiments")
LORA = "LoRA"
_KEYS = {"method": str, "options": dict, "training": dict, "published": dict}
_PUBLISHED_KEYS = ("experiment", "test_accuracy")


@dataclass(frozen=True)
class Experiment:
    """A method with its options and the training settings that differ from the defaults.

    Attributes:
        name: the folder and the name of the file, such as `lora/llama-3.2-3B-rank32`.
        method: the name of a method's class in softhooks, or `LoRA`, which is PEFT's.
        options: arguments of the class.
        training: training settings.
        published: PEFT's own experiment with these settings, and its test accuracy; empty if there is none.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    published: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name in results, which tells the experiment from PEFT's own."""
        return f"{'harness' if self.method == LORA else 'softhooks'}-{self.name}"


def read_experiment(path: Path) -> Experiment:
    """Read and check a file.

    Raises:
        ExperimentError: the file is not JSON, or contains an unknown key, method, option or setting.
    """
    try:
        experiment = _parse(f"{path.parent.name}/{path.stem}", json.loads(path.read_text(encoding="utf-8")))
        _check(experiment)
    except json.JSONDecodeError as error:
        raise ExperimentError(f"{path} is not JSON: {error}.") from error
    except ExperimentError as error:
        raise ExperimentError(f"{path}: {error}") from error
    return experiment


def _parse(name: str, content: Any) -> Experiment:
    if not isinstance(content, dict):
        raise ExperimentError(f"the file contains a {type(content).__name__}; it must contain an object.")
    check_names(content, _KEYS, "a key of an experiment")
    for key, value in content.items():
        if not isinstance(value, _KEYS[key]):
            raise ExperimentError(f"{key} is {value!r}; it must be of type {_KEYS[key].__name__}.")
    if "method" not in content:
        raise ExperimentError("method is missing; it is the name of a method's class.")
    check_names(content.get("published", {}), _PUBLISHED_KEYS, "a key of `published`")
    return Experiment(name, **content)


def _check(experiment: Experiment) -> None:
    from benchmarks.metamath.contestants import option_names  # imports torch

    check_names(experiment.options, option_names(experiment.method), f"an option of {experiment.method}")
    settings = Settings.of(experiment.training)
    if settings.init_kv_cache_prefix is not None and experiment.method != "PrefixTuning":
        raise ExperimentError(f"init_kv_cache_prefix is given for {experiment.method}; only PrefixTuning accepts it.")


def names(folder: Path = EXPERIMENTS) -> list[str]:
    """Return the names of all experiments."""
    return sorted(f"{path.parent.name}/{path.stem}" for path in folder.glob("*/*.json"))


def choose(given: Sequence[str], every: bool, folder: Path = EXPERIMENTS) -> list[str]:
    """Return the names of the chosen experiments; the name of a folder chooses all in it.

    Raises:
        ExperimentError: a name is unknown, or nothing is chosen.
    """
    known = names(folder)
    if every:
        return known
    if not given:
        raise ExperimentError("no experiment is chosen; pass --experiment NAME, --all, or --list to see the names.")
    chosen: list[str] = []
    for name in given:
        found = [each for each in known if name in (each, each.partition("/")[0])]
        if not found:
            raise ExperimentError(f"there is no experiment {name!r}; choose from {', '.join(known)}.")
        chosen += found
    return list(dict.fromkeys(chosen))
