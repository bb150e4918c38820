"""Fill the variables of your account into files of `cluster_configs/` and `jobs/`.

    export RAYCLUST_BUCKET=s3://my-bucket RAYCLUST_IMAGE=registry.example.org/rayclust
    python cluster_configs/render.py jobs/smoke.yaml | rayclust submit - --address http://localhost:8265
    python cluster_configs/render.py cluster_configs/kuberay-cluster.yaml jobs/*.yaml --out mine

`ray up`, `kubectl` and `aws` read their files without expanding variables of the environment, so the files hold
`${RAYCLUST_BUCKET}` and this script replaces it. Nothing else in a file changes. Needs no package.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PATTERNS = {
    "RAYCLUST_BUCKET": r"(s3|gs)://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]",
    "RAYCLUST_IMAGE": r"[A-Za-z0-9.-]+(:[0-9]+)?(/[a-z0-9._-]+)+",
    "RAYCLUST_REGION": r"[a-z0-9-]+",
    "RAYCLUST_ZONE": r"[a-z0-9-]+",
    "RAYCLUST_PROJECT": r"[a-z][a-z0-9-]{4,28}[a-z0-9]",
}
"""Variables and the values they take; a value that could change the meaning of YAML or a shell line matches none."""

MEANINGS = {
    "RAYCLUST_BUCKET": "a bucket with its scheme and without a path, such as s3://my-bucket",
    "RAYCLUST_IMAGE": "registry and name of the image without a tag, such as registry.example.org/rayclust",
    "RAYCLUST_REGION": "the provider's region, such as us-east-1",
    "RAYCLUST_ZONE": "a zone of the region that has the GPUs, such as us-central1-a",
    "RAYCLUST_PROJECT": "the id of the Google Cloud project",
}


def render(text: str, environment: Mapping[str, str]) -> str:
    """Return `text` with every `${RAYCLUST_…}` replaced by its value.

    Args:
        text: any file. Other variables, such as `$RAY_HEAD_IP`, stay as they are.
        environment: values by name. RAYCLUST_BUCKET_NAME and RAYCLUST_REGISTRY are derived from it.

    Raises:
        ValueError: a variable of the text is unknown, not set, or has a value of another form; names all of them.
    """
    values = {name: environment.get(name, "") for name in PATTERNS}
    sources = {name: name for name in PATTERNS}
    values["RAYCLUST_BUCKET_NAME"] = values["RAYCLUST_BUCKET"].partition("://")[2]
    values["RAYCLUST_REGISTRY"] = values["RAYCLUST_IMAGE"].partition("/")[0]
    sources |= {"RAYCLUST_BUCKET_NAME": "RAYCLUST_BUCKET", "RAYCLUST_REGISTRY": "RAYCLUST_IMAGE"}

    names = dict.fromkeys(re.findall(r"\$\{(RAYCLUST_\w+)\}", text))
    unknown = [f"{name}: no such variable" for name in names if name not in sources]
    wanted = dict.fromkeys(sources[name] for name in names if name in sources)
    wrong = [
        f"{name} = {values[name] or '(not set)'}: must be {MEANINGS[name]}"
        for name in wanted
        if not re.fullmatch(PATTERNS[name], values[name])
    ]
    if unknown or wrong:
        raise ValueError("\n".join(unknown + wrong))
    return re.sub(r"\$\{(RAYCLUST_\w+)\}", lambda found: values[found[1]], text)


def main(line: Sequence[str] | None = None) -> int:
    """Write one file to standard output, or any number of them into a folder; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, default=None, help="folder to write the files into, under their names")
    asked = parser.parse_args(line)
    if asked.out is None and len(asked.files) > 1:
        parser.error("several files need --out FOLDER")
    for path in asked.files:
        try:
            text = render(path.read_text(encoding="utf-8"), os.environ)
        except (OSError, ValueError) as error:
            sys.stderr.write("".join(f"{path}: {part}\n" for part in str(error).splitlines()))
            return 2
        if asked.out is None:
            sys.stdout.write(text)
        else:
            asked.out.mkdir(parents=True, exist_ok=True)
            (asked.out / path.name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
