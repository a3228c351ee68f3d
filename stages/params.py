"""The experiment's params: params.yaml and the profile that it names, read once into one validated object.

`params.yaml` holds what a reader of the paper would vary, `profiles/<profile>.yaml` the scale; no key is in both.
An unknown key, a wrong type or a value out of range ends a stage with one line that names the key.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from io import StringIO
from operator import getitem
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from ruamel.yaml import YAML, YAMLError

Positive = Annotated[int, Field(gt=0, lt=2**31)]  # positions are int32
Natural = Annotated[int, Field(ge=0, lt=2**31)]
Width = Annotated[int, Field(gt=0, le=2**16)]  # of a layer, in features or heads: more is no model but a slip
Rate = Annotated[float, Field(gt=0, lt=1)]


def tracked(source: str, *places: str) -> bool:
    """Whether a path is in one of these folders, on which a stage depends in dvc.yaml: DVC would not see it change
    elsewhere, and would go on with what was made of the old content. Nor does DVC look into a link to a folder."""
    path = Path(source).expanduser()
    folder = (path if path.is_dir() else path.parent).resolve()
    return any(folder.is_relative_to(Path(place).resolve()) for place in places)


def only_in(*places: str) -> AfterValidator:
    def check(sources: list[str]) -> list[str]:
        for source in sources:
            if "://" not in source and source not in places and not tracked(source, *places):
                raise ValueError(f"{source} is not in {places[-1]}, where DVC sees it change (links to files will do)")
        return sources

    return AfterValidator(check)


# URIs of dsa/data/sources.py, tried in order; a single one needs no brackets.
Sources = Annotated[
    list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value), Field(min_length=1)
]
Rows = Annotated[Sources, only_in("python-packages", "data/local/rows")]

# Names of dsa/ablations.py, which takes seconds to import.
Ablation = Literal["none", "rope_none", "rope_all", "no_kl", "per_kv_head"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Indexer(Section):
    n_heads: Width
    head_dim: Annotated[Width, Field(multiple_of=4)]  # RoPE turns half of it, in pairs


class Model(Section):
    source: Annotated[Sources, only_in("data/base", "data/local/model")]
    sha256: dict[str, str] = {}  # of files, whatever the source


class Phase(Section):
    """Steps of rows of one length."""

    length: Positive
    rows: Positive
    steps: Positive
    mix: str  # one of the mixes
    learning_rate: Rate  # of Muon at its beginning; it goes to the next phase's
    far: Natural = 0  # positions that a row spans at most by jumps
    gaps: Annotated[float, Field(ge=0, le=1)] = 0.0  # the share of rows that jump
    most: Positive = 10**9  # keys of a row


class Pretrain(Section):
    vocab_size: Positive
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Width
    num_attention_heads: Width
    num_key_value_heads: Width
    head_dim: Width
    rope_theta: Annotated[float, Field(gt=0, le=1e12)]
    mixes: dict[str, dict[str, Annotated[float, Field(ge=0, le=1)]]]  # how often each kind of row
    phases: list[Phase]
    last_learning_rate: Rate


class Data(Section):
    source: Rows
    packages: list[str] | Literal["default"] = []  # of the source python-packages; default: dsa/data/corpus.py has them
    rows: Positive | None = None  # that the source python-packages offers
    min_tokens: Positive
    samples: Positive
    max_length: Positive
    max_bad_rows: Natural
    test_fraction: Rate
    split_by: Literal["prompt", "data_source"]
    mean_tokens: Positive | None = (
        None  # of a row, as far as is known: the stage preflight estimates with it, None: all long
    )

    @field_validator("max_length")
    @classmethod
    def longer_than_wanted(cls, length: int, info: ValidationInfo) -> int:
        if length <= (wanted := info.data.get("min_tokens", 0)):
            raise ValueError(f"rows over data.min_tokens = {wanted} would all be cut to that or less")
        return length


class Preference(Section):
    source: Rows
    rows: Positive | None = None  # that the source python-packages offers
    domains: Annotated[list[str], Field(min_length=1)] | None = None  # None: all
    pairs: Positive
    max_length: Positive
    max_bad_rows: Natural
    test_fraction: Rate
    split_by: Literal["prompt", "data_source"]
    mean_tokens: Positive | None = None  # of a prompt with an answer, as above


class Training(Section):
    steps: Positive
    batch_size: Positive  # rows a step, over all processes and micro-batches
    learning_rate: Rate
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    gradient_checkpointing: bool = False


class WarmupTraining(Training):
    steps: Natural  # 0: sparse training begins with an indexer that has learned nothing
    gradient_checkpointing: Literal[False] = False  # the frozen backbone keeps nothing for backward: it would only cost


class SparseTraining(Training):
    indexer_learning_rate: Rate


class DPO(Training):
    beta: Annotated[float, Field(gt=0, le=1000)]  # strength of the tie to the reference
    indexer: Literal["frozen", "kl"]  # kept as it is, or trained on by its KL over the selected keys
    held_out: Positive  # pairs
    generations: Natural


class Retrieval(Section):
    lengths: list[Annotated[int, Field(ge=256, lt=2**31)]]  # tokens of a row
    rows: Positive  # of 20 questions, of each test and length


class Evaluate(Section):
    rows: Positive  # held-out rows, the first so many
    control_rows: Positive  # of them, for the arms that were not trained and for the sweep
    topk_sweep: list[Positive]  # k at inference, without retraining
    statistics_rows: Positive  # of them, for mass and recall
    retrieval: Retrieval
    generations: Natural


class Benchmark(Section):
    topk: list[Positive]  # beside the experiment's own
    decode: list[Positive]  # positions
    prefill: list[Positive]
    train: list[Positive]  # lengths of a training step
    repeats: Positive


class Speed(Section):
    """Of the trained model, end to end; lengths in tokens."""

    prefill: list[Positive]
    decoding: list[Positive]  # tokens in the cache
    training: list[Positive]
    generated: Positive  # tokens of a call of generate
    repeats: Positive


class Harness(Section):
    tasks: list[str]  # of lm-evaluation-harness, or paths of tasks' YAMLs; none: the stage does nothing
    limit: Positive | None  # documents a task
    fewshot: Natural | None
    max_length: Positive
    ruler_lengths: list[Positive]

    @field_validator("ruler_lengths")
    @classmethod
    def fit(cls, lengths: list[int], info: ValidationInfo) -> list[int]:
        if max(lengths, default=0) > info.data.get("max_length", math.inf):
            raise ValueError(f"prompts would be cut to harness.max_length = {info.data['max_length']}")
        return lengths


class Params(Section):
    profile: str
    rehearsal: bool = False  # too few rows and steps for numbers that mean anything: the report says so
    seed: Natural
    topk: Positive
    indexer: Indexer
    ablation: Ablation = "none"
    model: Model
    pretrain: Pretrain | None = None
    data: Data
    dense: Training
    warmup: WarmupTraining
    sparse: SparseTraining
    preference: Preference
    dpo: DPO
    evaluate: Evaluate
    harness: Harness
    benchmark: Benchmark
    speed: Speed


class ParamsError(SystemExit):
    """Bad params; str() is the one line to show."""


@contextmanager
def one_line(*errors: type[Exception]) -> Iterator[None]:
    """End the stage with the one line of an error that the user can do something about, and no traceback."""
    try:
        yield
    except errors as error:
        raise SystemExit(str(error)) from None


class Declared:
    """A view of the params that shows a stage no more than dvc.yaml declares for it.

    A param that is read but not declared would leave stale results behind when it changes: here it is an error.
    """

    def __init__(self, value: Section, keys: set[str], stage: str, prefix: str = ""):
        self._value, self._keys, self._stage, self._prefix = value, keys, stage, prefix

    def __getattr__(self, name: str):
        path, value = self._prefix + name, getattr(self._value, name)
        if path in self._keys:
            return value
        if any(key.startswith(path + ".") for key in self._keys):
            return Declared(value, self._keys, self._stage, path + ".")
        raise ParamsError(f"dvc.yaml: {self._stage}: reads the param {path}, but does not declare it")


def yaml() -> YAML:
    """YAML 1.2, which is what DVC reads and writes: 1e-5 is a number, no and on are words."""
    dialect = YAML(typ="safe", pure=True)
    dialect.default_flow_style, dialect.sort_base_mapping_type_on_output = False, False
    return dialect


def dump(content: dict) -> str:
    text = StringIO()
    yaml().dump(content, text)
    return text.getvalue()


def read(path: Path) -> dict:
    try:
        content = yaml().load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file") from None
    except YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ParamsError(f"{path}: expected keys and values")
    return content


def entry(stage: str, profile: str, root: Path = Path()) -> dict:
    """A stage of dvc.yaml, or "name@item" of a foreach stage, as DVC resolves it for a profile."""
    name, _, item = stage.partition("@")
    content = read(root / "dvc.yaml")["stages"][name]
    values = {"profile": profile}
    if item:
        values |= {"key": item} | {f"item.{field}": value for field, value in content["foreach"][item].items()}
        content = content["do"]
    text = json.dumps(content)
    for field, value in values.items():
        text = text.replace(f"${{{field}}}", value)
    return json.loads(text)


def declared(stage: str, profile: str, root: Path = Path()) -> set[str]:
    """The param keys that dvc.yaml declares for a stage."""
    keys = set()
    for item in entry(stage, profile, root)["params"]:
        if isinstance(item, str):
            keys.add(item)
        else:
            ((file, names),) = item.items()
            if file == f"profiles/{profile}.yaml":  # the whole file, with what it might have and has not
                absent = Params.model_fields.keys() - read(root / "params.yaml")
                keys.update(names or absent | read(root / file).keys())
    return keys


def dependencies(stage: str, root: Path = Path()) -> dict:
    """What DVC counts as the dependencies of a stage: {"cmd": ..., "deps": paths, "params": values by key}."""
    params = load(root=root)
    found, values = entry(stage, params.profile, root), params.model_dump()
    keys = sorted(declared(stage, params.profile, root))
    values = {key: reduce(getitem, key.split("."), values) for key in keys}
    return {"cmd": found["cmd"], "deps": found["deps"], "params": values}


def merge(knobs: dict, scale: dict, file: str, prefix: str = "") -> dict:
    """The two files as one. A key may be a section in both, but no value is in both."""
    merged = knobs | scale
    for key in knobs.keys() & scale.keys():
        if not (isinstance(knobs[key], dict) and isinstance(scale[key], dict)):
            raise ParamsError(f"{file}: {prefix}{key}: belongs to params.yaml only")
        merged[key] = merge(knobs[key], scale[key], file, f"{prefix}{key}.")
    return merged


def holds(content: dict, path: tuple) -> bool:
    """Whether a file has a value at `path`."""
    for part in path:
        if not isinstance(content, dict) or part not in content:
            return isinstance(content, list)
        content = content[part]
    return True


def load(stage: str | None = None, root: Path = Path(), profile: str | None = None) -> Params:
    """The validated params of the experiment at `root`: what dvc.yaml declares for `stage`, or all of them.

    Args:
        profile: instead of the one that params.yaml names, for a stage that belongs to a certain profile.

    Raises ParamsError, which ends a program with its one line.
    """
    knobs = read(root / "params.yaml")
    profile = profile or knobs.get("profile")
    if not isinstance(profile, str) or not (root / "profiles" / f"{profile}.yaml").is_file():
        known = ", ".join(sorted(p.stem for p in (root / "profiles").glob("*.yaml")))
        raise ParamsError(f"params.yaml: profile: no profile {profile!r}; there are: {known}")
    file = f"profiles/{profile}.yaml"
    scale = read(root / file)
    try:
        params = Params.model_validate(merge(knobs, scale, file))
    except ValidationError as error:
        first = error.errors()[0]
        section = first["loc"][0]
        if holds(knobs, first["loc"]) or section not in scale:
            file = "params.yaml" if section in knobs else file
        elif section in knobs and not holds(scale, first["loc"]):
            file = f"params.yaml or {file}"
        key = ".".join(str(part) for part in first["loc"])
        raise ParamsError(f"{file}: {key}: {first['msg']} (got {first['input']!r})") from None
    return Declared(params, declared(stage, profile, root), stage) if stage else params


if __name__ == "__main__":  # before the long stages
    from stages.harness import check

    check(load().harness.tasks)
