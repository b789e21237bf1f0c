"""The npm packages that the training data is made from: fetched by npm, at one version each, and checked by their hash."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffuserve.errors import DiffuserveError


class TrainingDataError(DiffuserveError):
    """The training data cannot be had, or is not what it was."""

    code = "training_data_error"


@dataclass(frozen=True)
class Package:
    """`integrity` as npm's lock files have it: sha512 of the archive, in base64."""

    name: str
    version: str
    integrity: str
    licence: str

    @property
    def file(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


FLUENT = Package(
    "@iconify-json/fluent-emoji",
    "1.2.7",
    "sha512-D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
    "MIT",
)
FLUENT_FLAT = Package(
    "@iconify-json/fluent-emoji-flat",
    "1.2.6",
    "sha512-RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
    "MIT",
)
NOTO = Package(
    "@iconify-json/noto",
    "1.2.9",
    "sha512-DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
    "Apache-2.0",
)
EMOJIBASE = Package(
    "emojibase-data",
    "17.0.0",
    "sha512-Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
    "MIT",
)


def read_json(package: Package, member: str, cache: Path) -> Any:
    """A JSON file of a package, which is fetched first if `cache` does not have it.

    Args:
        package: one of this module's.
        member: path in the package, such as icons.json.
        cache: a folder for the archives.

    Raises:
        TrainingDataError: npm is missing or cannot fetch it, or what it fetched has another hash.
    """
    with tarfile.open(_archive(package, cache)) as archive:
        file = archive.extractfile(f"package/{member}")
        if file is None:
            raise TrainingDataError(f"{package.name} {package.version} has no file {member}.")
        return json.load(file)


def _archive(package: Package, cache: Path) -> Path:
    path = cache / package.file
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        _fetch(package, path)
    _check(package, path)
    return path


def _fetch(package: Package, path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise TrainingDataError(
            f"npm fetches {package.name}, and is not installed. Install Node.js, or put {package.file} into {path.parent}."
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        arguments = [npm, "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
        done = subprocess.run(arguments, cwd=name, capture_output=True, text=True, timeout=600, check=False)
        fetched = Path(name) / package.file
        if done.returncode or not fetched.is_file():
            raise TrainingDataError(f"npm cannot fetch {package.name} {package.version}: {done.stderr.strip()[-300:]}")
        _check(package, fetched)
        fetched.replace(path)


def _check(package: Package, path: Path) -> None:
    digest = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if f"sha512-{digest}" != package.integrity:
        raise TrainingDataError(f"{path} is not {package.name} {package.version}: its hash differs. Remove it.")
