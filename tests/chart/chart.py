"""The chart, rendered by Helm itself, and objects judged offline: Kubernetes' own by the schemas of its releases, those
of others by schemas in schemas/, which name where they come from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helm_python as helm
import jsonschema
import kubernetes_validate
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "kubernetes" / "quire"
SCHEMAS = Path(__file__).parent / "schemas"
NAMESPACE = "models"
OLDEST, NEWEST = "1.27", kubernetes_validate.latest_version()

Object = dict[str, Any]


def render(values: Object | None = None, name: str = "demo") -> list[Object]:
    """The objects. Raises helm.HelmError with what Helm says of values that are refused."""
    with helm.Chart.load(CHART) as chart:
        files = chart.render(values or {}, name=name, namespace=NAMESPACE)
    return [
        found
        for path, text in sorted(files.items())
        if path.endswith(".yaml")
        for found in yaml.safe_load_all(text)
        if found is not None
    ]


def one(objects: list[Object], kind: str) -> Object:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def pod(objects: list[Object]) -> Object:
    template: Object = one(objects, "Deployment")["spec"]["template"]
    return template


def container(objects: list[Object]) -> Object:
    (found,) = pod(objects)["spec"]["containers"]
    return dict(found)


def validate(item: Object, version: str) -> None:
    """Raises ValidationError for what that release of Kubernetes, or the custom resource, does not know."""
    group, _, api = item["apiVersion"].rpartition("/")
    schema = SCHEMAS / f"{group}_{api}_{item['kind'].lower()}.json"
    if schema.exists():
        jsonschema.validate(item, json.loads(schema.read_text()))
    else:
        kubernetes_validate.validate(item, version, strict=True)
