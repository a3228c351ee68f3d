"""The experiment's params: params.yaml and the profile that it names, read once into one validated object.

`params.yaml` holds what a reader of the paper would vary, `profiles/<profile>.yaml` the scale; no key is in both.
An unknown key, a wrong type or a value out of range ends a stage with one line that names the key.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Indexer(Section):
    n_heads: Positive
    head_dim: Annotated[int, Field(gt=0, multiple_of=4)]  # RoPE turns half of it, in pairs


class Model(Section):
    source: str


class Phase(Section):
    length: Positive
    steps: Positive
    lookup_share: Annotated[float, Field(ge=0, le=1)]


class Pretrain(Section):
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    num_key_value_heads: Positive
    head_dim: Positive
    rope_theta: Annotated[float, Field(gt=0)]
    learning_rate: Rate
    batch_tokens: Positive
    phases: list[Phase]


class Data(Section):
    source: str
    packages: list[str] = []
    rows: Positive
    min_tokens: Positive
    samples: Positive
    max_length: Positive
    test_fraction: Rate
    split_by: Literal["prompt", "data_source"]


class Params(Section):
    profile: str
    seed: Annotated[int, Field(ge=0)]
    topk: Positive
    indexer: Indexer
    model: Model
    pretrain: Pretrain | None = None
    data: Data


class ParamsError(SystemExit):
    """Bad params; str() is the one line to show."""


def read(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: expected keys and values")
    return content


def load(root: Path = Path()) -> Params:
    """The validated params of the experiment at `root`. Raises ParamsError, which ends a program with its one line."""
    knobs = read(root / "params.yaml")
    profile = knobs.get("profile")
    if not isinstance(profile, str) or not (root / "profiles" / f"{profile}.yaml").is_file():
        known = ", ".join(sorted(p.stem for p in (root / "profiles").glob("*.yaml")))
        raise ParamsError(f"params.yaml: profile: no profile {profile!r}; there are: {known}")
    scale = read(root / "profiles" / f"{profile}.yaml")
    if twice := knobs.keys() & scale.keys():
        raise ParamsError(f"profiles/{profile}.yaml: {', '.join(sorted(twice))}: belongs to params.yaml only")
    try:
        return Params.model_validate(knobs | scale)
    except ValidationError as error:
        first = error.errors()[0]
        file = "params.yaml" if first["loc"][0] in knobs else f"profiles/{profile}.yaml"
        key = ".".join(str(part) for part in first["loc"])
        raise ParamsError(f"{file}: {key}: {first['msg']} (got {first['input']!r})") from None


if __name__ == "__main__":
    load()
    sys.exit(0)
