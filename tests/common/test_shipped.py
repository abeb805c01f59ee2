"""Configurations and sweeps that every installed FedVeil carries by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedveil.common.config.shipped import EXPERIMENTS, is_name, shipped
from fedveil.common.config.text import parse_settings, read_settings_file
from fedveil.common.errors import ConfigError
from fedveil.experiments.sweep.file import read_sweep


def test_a_configuration_is_named_without_its_path_and_a_pair_after_it_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secure-sum").mkdir()  # a folder of the user's is no configuration
    given = read_settings_file(EXPERIMENTS / "configs" / "secure-sum.toml")
    assert parse_settings(["secure-sum"]) == given
    assert parse_settings(["secure-sum", "privacy.epsilon=1.0"]) == {**given, "privacy.epsilon": 1.0}
    pissa = EXPERIMENTS / "configs" / "systems" / "pissa.toml"
    assert parse_settings(["systems/pissa"]) == read_settings_file(pissa)


def test_a_sweep_is_named_likewise() -> None:
    assert read_sweep(Path("secure-sum")) == read_sweep(EXPERIMENTS / "sweeps" / "secure-sum.toml")


def test_every_shipped_file_has_a_name() -> None:
    for kind in ("configs", "sweeps"):
        for path in (EXPERIMENTS / kind).rglob("*.toml"):
            name = path.relative_to(EXPERIMENTS / kind).with_suffix("").as_posix()
            assert is_name(name)
            assert shipped(name, kind) == path


@pytest.mark.parametrize("name", ["secure-sums", "rounds", "systems/pisa", "configs/secure-sum", "tiny"])
def test_an_unknown_name_is_one_line_with_what_there_is(name: str) -> None:
    with pytest.raises(ConfigError, match=r"no configuration .* key=value, .*\.toml, .*secure-sum, snli") as refusal:
        parse_settings([name])
    assert "\n" not in str(refusal.value)
    assert ("did you mean 'secure-sum'?" in str(refusal.value)) == name.endswith(("sums", "sum"))


def test_a_name_never_leaves_the_folder() -> None:
    assert not [name for name in ("../sweeps/tiny", "/etc/passwd", "a//b", "", "A", "a.toml", "a=1") if is_name(name)]
