"""The numbers of a long example, kept in a file after every run: a second call goes on where the first one stopped."""

import argparse
import json
from pathlib import Path
from typing import Any


def load(parser: argparse.ArgumentParser, path: Path, about: dict[str, Any]) -> dict[str, dict]:
    """The results in the file, none if there is no file; an error of ``parser`` if they are of other settings."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text())
    if kept["about"] != about:
        parser.error(f"{path} has the numbers of {kept['about']}: take another --output")
    return kept["results"]


def save(path: Path, about: dict[str, Any], results: dict[str, dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "results": results}))
