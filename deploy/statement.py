"""The statement of a site's steward, from the site's policy: the steward hands it over, and nothing sends it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import ConfigError
from deploy.site_folder import node_settings, policy_of_node
from reports.statements import QUESTIONS, statement_text

if TYPE_CHECKING:
    from deploy.site_folder import SiteFolder


def statement_of(folder: SiteFolder) -> str:
    """Return the statement as TOML.

    Raises:
        ConfigError: the policy cannot be read, or answers none of the questions.
    """
    settings = node_settings(folder)
    policy = policy_of_node(settings)
    answers = {key: str(getattr(policy, key.replace("-", "_"))) for key in QUESTIONS}
    if not any(answers.values()):
        raise ConfigError(
            f"{settings['policy']} states nothing about its records: add {', '.join(QUESTIONS)}, each as text in quotes"
        )
    dataset = policy.dataset_of(settings, str(settings["site"]))
    return statement_text(str(settings["site"]), dataset, answers)
