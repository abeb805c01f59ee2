"""The file of a sweep: a base configuration, and the axes that are laid over it.

::

    base = "job.toml"                     # settings of every run; beside this file, or an absolute path
    sites = 4                             # simulated sites
    seeds = [1, 2, 3]
    partition-by-seed = true              # each seed divides the records, and cuts the test part
    epsilons = [1.0, 8.0, "none"]
    baselines = ["local-only", "pooled"]  # beside every variant, at the same ε and on the same test part; "fitted-head"
                                          # beside one of them: once a seed and without privacy

    [settings]                            # laid over the base
    evaluate-every = 6

    [variants.wide]                       # a row of the table
    config = "wide.toml"                  # laid over the base, like settings; both may be left out
    settings = { adapter.rank = 32 }
    baselines = []                        # instead of the sweep's, like epsilons

A file of a run's settings and of none of these keys is that one run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from fedveil.common.check import nearest
from fedveil.common.config.flat import Scalar
from fedveil.common.config.shipped import is_name, shipped
from fedveil.common.config.text import flatten, read_settings_file
from fedveil.common.data.partition import check_partition
from fedveil.common.errors import ConfigError
from fedveil.common.paths import RUN_NAME
from fedveil.common.toml import read_toml
from fedveil.experiments.hub_sources import fetched
from fedveil.experiments.recipes import check_recipes, names_recipe
from fedveil.experiments.site_count import USUAL
from fedveil.experiments.sweep.arms import ARMS, BASELINES, FEDERATED
from fedveil.privacy import MECHANISMS, promising
from fedveil.strategies import ROWS
from fedveil.strategies.job import Job, configure, with_recipe
from fedveil.strategies.options import known_settings
from fedveil.strategies.recipes import AUTO
from fedveil.strategies.rules import RULES

KEYS = ("base", "sites", "seeds", "partition-by-seed", "epsilons", "baselines", "settings", "variants")
LISTS = ("seeds", "epsilons", "baselines")
"""Keys that are axes."""
VARIANT_KEYS = ("config", "settings", "epsilons", "baselines")
AXES = {
    "seed": "seeds",
    "privacy.epsilon": "epsilons",
    "output": "the option --output",
    "resume": "the same command again, which goes on",
}
"""Settings that the sweep gives every run, and where they are said."""
BASE = "base"
"""The variant of a file that names none."""
NONE = "none"
"""The ε of a run without privacy."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    variant: str
    arm: str
    site: int | None
    """Of a run that is one site's own."""
    epsilon: float | None
    """The budget; None: no privacy."""
    seed: int
    sites: int
    """That the records are divided among."""
    settings: Mapping[str, Scalar]
    """As the file gives them, flat, without ``output``."""

    @property
    def name(self) -> str:
        """Return what its folder and its run are called."""
        words = [self.variant, f"eps-{epsilon_name(self.epsilon)}", f"seed-{self.seed}"]
        if self.arm != FEDERATED:
            words.append(self.arm if self.site is None else f"{self.arm}-{self.site}")
        return "-".join(words)

    @property
    def said(self) -> str:
        """Return it in words."""
        arm = "" if self.arm == FEDERATED else f", {self.arm}"
        site = "" if self.site is None else f" site {self.site}"
        return f"{self.variant}{arm}{site}, ε {epsilon_name(self.epsilon)}, seed {self.seed}"

    def job(self, output: Path) -> Job:
        """Return the checked configuration of its run, whose folder is made in ``output``."""
        return configure({**self.settings, "output": str(output)})


@dataclass(frozen=True)
class Sweep:
    """What a sweep runs."""

    name: str
    """Of its file."""
    cells: tuple[Cell, ...]

    @property
    def recipes(self) -> dict[str, str]:
        """The recipe of each variant."""
        return {cell.variant: str(cell.settings["recipe"]) for cell in self.cells if cell.arm == FEDERATED}


def epsilon_name(epsilon: float | None) -> str:
    """Return an ε of the axis as the file writes it."""
    return NONE if epsilon is None else f"{epsilon:g}"


def read_sweep(path: Path, *, simulated: bool = True) -> Sweep:
    """Return the runs of a sweep's file, or the one of a run's settings, each checked as ``configure`` checks a run.

    Args:
        path: of the file, or the name of a shipped sweep, such as ``tiny``.
        simulated: whether sites divide ``data.name`` among them; real ones have records of their own.

    Raises:
        ConfigError: the file cannot be read, has an unknown key, sets an axis, or one of its runs is invalid.
    """
    path = shipped(str(path), "sweeps") if is_name(str(path)) else path
    content = read_toml(path, "the sweep")
    try:
        cells = tuple([_single(content)] if _is_run(content) else _cells(content, path.parent))
        for cell in cells if simulated else ():
            _check_partition(cell)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return Sweep(path.stem, cells)


def _is_run(content: Mapping[str, Any]) -> bool:
    """Whether a file has settings of a run, and nothing of a sweep, whose axes are lists."""
    known = {*(key.partition(".")[0] for key in known_settings()), *ROWS, *RULES}
    axes = any(isinstance(value, list) for value in content.values())
    return bool(known & content.keys()) and not axes and not set(KEYS) & content.keys()


def _single(content: Mapping[str, Any]) -> Cell:
    """Return the run of a run's own settings, at the usual number of sites, with its own seed and ε."""
    given = {**known_settings(), **(own := fetched(flatten(content)))}
    mode, seed, epsilon = (given[key] for key in ("privacy.mode", "seed", "privacy.epsilon"))
    budget = _epsilon(epsilon) if mode not in MECHANISMS or mode in promising() else None
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed must be a whole number, not {seed!r}")
    cell = Cell(BASE, FEDERATED, None, budget, seed, USUAL, _with_recipe(own, {}, USUAL))
    _check(cell)
    return cell


def _cells(content: Mapping[str, Any], folder: Path) -> list[Cell]:
    _known(content, KEYS, "")
    if not {"variants", "settings", "base", *LISTS} & content.keys():
        raise ConfigError(f"it says nothing that is to be run: name {', '.join(LISTS)}, variants, settings or a base")
    variants = content.get("variants", {BASE: {}})
    if not isinstance(variants, Mapping) or not variants:
        raise ConfigError("variants must be tables, one a row: [variants.NAME]")
    sites = content.get("sites", USUAL)
    if not isinstance(sites, int) or isinstance(sites, bool) or sites < 1:
        raise ConfigError(f"sites must be a whole number above 0, not {sites!r}")
    by_seed = content.get("partition-by-seed", True)
    if not isinstance(by_seed, bool):
        raise ConfigError(f"partition-by-seed must be true or false, not {by_seed!r}")
    base = _settings(content, "base", folder, by_seed)
    cells: list[Cell] = []
    recipes, named = dict[str, str](), set[str]()
    for name, variant in variants.items():
        if not isinstance(variant, Mapping):
            raise ConfigError(f"variants.{name} must be a table, not {variant!r}")
        _known(variant, VARIANT_KEYS, f"variants.{name}.")
        own = {**base, **_settings(variant, "config", folder, by_seed, f"variants.{name}.")}
        named |= {name} if names_recipe(own) else set()
        of_variant, recipes[name] = _of_variant(name, {**content, **variant}, own, sites, by_seed=by_seed)
        cells += of_variant
    if len({cell.name for cell in cells}) < len(cells):
        raise ConfigError("two runs would have one name: give the variants other names, or the ε more distance")
    check_recipes(recipes, named)
    return cells


def _of_variant(
    name: str, axes: Mapping[str, Any], own: Mapping[str, Scalar], sites: int, *, by_seed: bool
) -> tuple[list[Cell], str]:
    """Return the runs of a variant, each checked, and its recipe.

    Args:
        name: of the variant.
        axes: the sweep's file with the variant's axes laid over it.
        own: settings of the variant, with the base below them.
        sites: number of sites.
        by_seed: whether a seed divides the records.
    """
    seeds = _listed(axes, "seeds", [1, 2, 3])
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ConfigError(f"seeds must be whole numbers, not {seeds!r}")
    arms = _listed(axes, "baselines", [])
    if unknown := [arm for arm in arms if arm not in BASELINES]:
        raise ConfigError(f"baselines names {unknown[0]!r}; choose of {', '.join(BASELINES)}")
    epsilons = [_epsilon(value) for value in _listed(axes, "epsilons", [known_settings()["privacy.epsilon"]])]
    # One method for all of a variant's ε: that of its private runs, if it has any.
    first = max(epsilons, key=lambda epsilon: epsilon is not None)
    own = _with_recipe(own, _protection(own, first, name), sites)
    cells: list[Cell] = []
    for epsilon, seed, arm in product(epsilons, seeds, ARMS.values()):
        # A fitted head is the same whatever the ε.
        if (arm.name != FEDERATED and arm.name not in arms) or (arm.fitted and epsilon != epsilons[0]):
            continue
        seeded = {"seed": seed, **({"data.seed": seed} if by_seed else {})}
        settings = {**arm.settings({**own, **_protection(own, epsilon, name)}), **seeded, **arm.overrides()}
        budget = None if arm.fitted else epsilon
        made = [Cell(name, arm.name, site, budget, seed, sites, settings) for site in arm.sites(sites)]
        _check(made[-1])
        cells += made
    return cells, str(own.get("recipe", AUTO))


def _with_recipe(own: Mapping[str, Scalar], protection: Mapping[str, Scalar], sites: int) -> dict[str, Scalar]:
    """Return a variant's settings with the recipe of its runs over that number of sites."""
    try:
        resolved = with_recipe({**own, **protection}, sites=sites)[0]
        return {**own, **{key: resolved[key] for key in ("recipe", "data.records") if key in resolved}}
    except ConfigError:
        return dict(own)  # its runs are checked one by one, and the first names what is wrong


def _known(table: Mapping[str, Any], keys: Sequence[str], prefix: str) -> None:
    for key in table:
        if key not in keys:
            raise ConfigError(f"unknown key {prefix + key!r}{nearest(key, keys)}; a sweep has {', '.join(keys)}")


def _listed(table: Mapping[str, Any], key: str, usual: list[Any]) -> list[Any]:
    value = table.get(key, usual)
    if not isinstance(value, list) or (not value and key != "baselines"):
        raise ConfigError(f"{key} must be a list, such as {key} = {usual}, not {value!r}")
    if len(set(map(str, value))) < len(value):
        raise ConfigError(f"{key} names something twice: {value!r}")
    return value


def _settings(
    table: Mapping[str, Any], file_key: str, folder: Path, by_seed: bool, prefix: str = ""
) -> dict[str, Scalar]:
    """Return a file's settings with those laid over it that stand in the sweep itself."""
    named, own = table.get(file_key, ""), table.get("settings", {})
    if not isinstance(named, str):
        raise ConfigError(f"{prefix}{file_key} must be the path of a file with settings, not {named!r}")
    if not isinstance(own, Mapping):
        raise ConfigError(f"{prefix}settings must be a table of settings, not {own!r}")
    laid = flatten(own)
    axes = {**AXES, **({"data.seed": "seeds, with partition-by-seed = true"} if by_seed else {})}
    for key in laid:
        if key in axes:
            raise ConfigError(f"{prefix}settings has {key!r}, which is the sweep's own: say it by {axes[key]}")
    return fetched({**(read_settings_file(folder / named) if named else {}), **laid})


def _epsilon(value: Any) -> float | None:
    if value == NONE:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"epsilons must be numbers above 0, or {NONE!r}, not {value!r}")
    return float(value)


def _protection(settings: Mapping[str, Scalar], epsilon: float | None, variant: str) -> dict[str, Scalar]:
    """Return the settings of privacy for one ε of the axis."""
    if epsilon is None:
        return {"privacy.mode": next(name for name in MECHANISMS if name not in promising())}
    mode = str(settings.get("privacy.mode", known_settings()["privacy.mode"]))
    if mode in MECHANISMS and mode not in promising():
        raise ConfigError(
            f"variant {variant!r} has privacy.mode {mode!r}, which promises nothing, and ε {epsilon:g}: "
            f'leave the mode out, or give the variant epsilons = ["{NONE}"]'
        )
    return {"privacy.mode": mode, "privacy.epsilon": epsilon}


def _check(cell: Cell) -> None:
    if not RUN_NAME.fullmatch(cell.name):
        raise ConfigError(
            f"the run would be called {cell.name!r}, which is not at most 64 of letters, digits, '.', '_' and '-': "
            "give the variant a shorter or plainer name"
        )
    try:
        job = cell.job(Path())
    except ConfigError as error:
        raise ConfigError(f"{cell.said}: {error}") from error
    if job.config.resume:
        raise ConfigError(f"{cell.said}: resume is set, and a sweep goes on by {AXES['resume']}")


def _check_partition(cell: Cell) -> None:
    try:
        check_partition(cell.job(Path()).config)
    except ConfigError as error:
        raise ConfigError(f"{cell.said}: {error}") from error
