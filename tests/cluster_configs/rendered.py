"""The files of cluster_configs/ as somebody's account fills them in."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster_configs"
ACCOUNT = {
    "RAYCLUST_BUCKET": "s3://my-bucket",
    "RAYCLUST_IMAGE": "123456789012.dkr.ecr.us-east-1.amazonaws.com/rayclust",
    "RAYCLUST_REGION": "us-east-1",
    "RAYCLUST_ZONE": "us-central1-a",
    "RAYCLUST_PROJECT": "my-project",
}


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cluster_configs_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(path: Path) -> str:
    rendered: str = script("render").render(path.read_text(), ACCOUNT)
    return rendered


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text(FOLDER / name)))


def read(name: str) -> dict[str, Any]:
    [content] = documents(name)
    return content
