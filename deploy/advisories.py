"""Known advisories of installed packages and their mended versions, for the doctor and docs/reference/advisories.md.

The lower bounds of ``pyproject.toml`` and ``requirements`` leave these versions out, but for cryptography's, which
Flower's pin asks for. None of the advisories could be opened where this was written: ``checked`` says on what an entry
rests. Neither the grades nor the versions are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from packaging.version import Version


class Checked(StrEnum):
    """On what it rests that an advisory is mended in a version."""

    SOURCE = "the packages' own sources"
    NOTES = "other projects' public upgrade notes"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Advisory:
    """One advisory of a package."""

    package: str
    """As on PyPI."""
    names: str
    """Its identifiers."""
    what: str
    mended: str
    """The first version without it."""
    status: str
    """Whether FedVeil reaches it."""
    checked: Checked = Checked.NOTES

    def row(self) -> str:
        """Return it as a row of the table in docs/reference/advisories.md."""
        cells = (f"`{self.package}`", self.names, self.what, self.mended, self.status, self.checked)
        return f"| {' | '.join(cells)} |"


ADVISORIES = (
    Advisory(
        "transformers",
        "CVE-2026-4372, GHSA-29pf-2h5f-8g72, critical",
        "`config.json` names code of the hub by `_attn_implementation_internal`, run past `trust_remote_code=False`",
        "5.3.0",
        "reached by whoever writes a model's folder; its files are compared before one is opened",
    ),
    Advisory(
        "transformers",
        "CVE-2026-5241, high",
        "a LightGlue configuration sets `trust_remote_code` itself",
        "5.5.0",
        "as above",
    ),
    Advisory(
        "transformers",
        "CVE-2026-9856, GHSA-xrqw-3rrv-vx5w, high",
        "`save_pretrained` writes chat templates outside its folder, by names from `tokenizer_config.json`",
        "5.10.0",
        "reached by `fedveil merge` and `prune` of somebody's model",
    ),
    Advisory(
        "torch",
        "CVE-2026-24747, GHSA-63cw-57p8-fm3p, high",
        "a checkpoint corrupts memory in `torch.load` with `weights_only=True`",
        "2.10.0",
        "FedVeil calls no `torch.load`; transformers reads `pytorch_model.bin` of a model's folder so",
    ),
    Advisory(
        "peft",
        "peft issue 3085",
        "an adapter's configuration names modules that are imported (`megatron_core`, `parent_library`)",
        "0.20.0",
        "reached by `ask`, `merge` and `evaluate` of somebody's run folder",
        Checked.SOURCE,
    ),
    Advisory(
        "pillow",
        "CVE-2026-25990, high",
        "a PSD image writes outside its memory",
        "12.1.1",
        "not reached: only the readers of PNG and JPEG are let at a file",
    ),
    Advisory(
        "pillow",
        "CVE-2026-40192, high; CVE-2026-42311",
        "a FITS image unpacks without a bound; what the other is was not found",
        "12.2.0",
        "the first is not reached, as above",
    ),
    Advisory(
        "pillow",
        "PYSEC-2026-2253 to -2257, -3451 to -3453 (CVE-2026-54059, -54060, -55379, -55380, -55798 among them)",
        "what they are was not found",
        "12.3.0",
        "not known",
    ),
    Advisory(
        "pyarrow",
        "CVE-2026-25087, GHSA-rgxp-2hwp-jwgg, high",
        "memory is used after it was freed when an Arrow IPC file is read ahead",
        "23.0.1",
        "not reached: Python has no call for it",
    ),
    Advisory(
        "onnx",
        "CVE-2026-27489, CVE-2026-28500, CVE-2026-34445, high",
        "files outside the model's folder are read; a warning of `onnx.hub` can be silenced; metadata sets attributes",
        "1.21.0",
        "unpacks one file, which is known by its hash",
    ),
    Advisory(
        "onnx",
        "CVE-2025-51480",
        "`save_external_data` writes outside its folder",
        "1.21.0",
        "not reached: FedVeil saves no ONNX file",
        Checked.UNCHECKED,
    ),
    Advisory(
        "jinja2",
        "CVE-2024-56201, CVE-2024-56326, CVE-2025-27516, high",
        "templates leave the sandbox",
        "3.1.6",
        "reached by the chat template of a model's tokenizer, which transformers runs in the sandbox",
    ),
    Advisory(
        "setuptools",
        "CVE-2025-47273, high; CVE-2026-24049 (its copy of wheel), high",
        "a package that is built writes, or changes rights, outside its folder",
        "80.10.2",
        "builds alone",
    ),
    Advisory(
        "setuptools",
        "CVE-2026-59890, PYSEC-2026-3447, moderate",
        "on macOS a source archive takes in files that it leaves out",
        "83.0.0",
        "builds alone",
    ),
    Advisory(
        "pip",
        "CVE-2025-8869, CVE-2026-1703, CVE-2026-3219, CVE-2026-6357, CVE-2026-8643; low to high",
        "archives that are installed write outside their folder, or count as another kind of archive",
        "26.1.2",
        "installs; wheels of models and data are compared by hash",
    ),
    Advisory(
        "cryptography",
        "GHSA-537c-gmf6-5ccf, high",
        "the OpenSSL that is linked into the wheels has faults of its own",
        "48.0.1",
        "**affected**: that OpenSSL checks the ECDSA signatures by which nodes prove themselves to the SuperLink, "
        "certificates' signatures, and reports' signatures. Which of its faults these calls reach was not determined. "
        "Not affected: TLS, which is gRPC's BoringSSL and Python's own OpenSSL",
    ),
    Advisory(
        "cryptography",
        "CVE-2026-69249, high",
        "a chain with doubled self-signed issuers takes exponential time in `cryptography.x509.verification`",
        "49.0.0",
        "not affected: neither FedVeil nor Flower imports that module; FedVeil compares one certificate with its "
        "issuer (`vulnerable_code_not_in_execute_path`)",
    ),
    Advisory(
        "cryptography",
        "CVE-2026-69248, moderate",
        "the same module lets a wildcard name past a name constraint",
        "49.0.0",
        "not affected, for the same reason",
    ),
    Advisory(
        "cryptography",
        "CVE-2026-69247, high",
        "`pkcs7_decrypt_der`, `_pem` and `_smime` tell by error and time how RSA padding failed",
        "50.0.0",
        "not affected: neither FedVeil nor Flower calls them or imports PKCS#7, and no RSA key is used "
        "(`vulnerable_code_not_in_execute_path`)",
    ),
)


def safe_versions() -> dict[str, Version]:
    """Return by package the lowest version that has none of ``ADVISORIES``."""
    packages = dict.fromkeys(advisory.package for advisory in ADVISORIES)
    return {
        package: max(Version(advisory.mended) for advisory in ADVISORIES if advisory.package == package)
        for package in packages
    }
