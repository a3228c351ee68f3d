"""Stage `model`: bring the base model to models/base."""

import shutil
from pathlib import Path

from stages import params

NEEDED = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    source = Path(params.load("model").model.source)
    if missing := [name for name in NEEDED if not (source / name).is_file()]:
        raise params.ParamsError(f"model.source: {source} has no {', '.join(missing)}")
    shutil.copytree(source, "models/base", dirs_exist_ok=True)


if __name__ == "__main__":
    main()
