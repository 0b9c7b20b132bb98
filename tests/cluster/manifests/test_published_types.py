"""Manifests are of KubeRay's published types, by which a misspelt name, a wrong type and a missing
field are found wherever they stand in them."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cluster.manifests.facts import FOLDER
from tests.cluster.manifests.kuberay import CLUSTER, INT32, KINDS, QUANTITY, TEXTS, Schema

Slip = tuple[str, str, Any, Schema]  # its kind, where it stands, what stands there, and its type


def loaded(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def is_valid(value: Any, schema: Schema) -> bool:
    return Draft202012Validator(schema).is_valid(value)


def slips(value: Any, schema: Schema, at: str = "$") -> Iterator[Slip]:
    """In everything that a manifest holds: another type, a field misspelt, a required one left
    out."""
    other = str(value) if isinstance(value, int) else [{"value": value}]
    yield "another type", at, other, schema
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name, held in value.items():
            rest = {field: value[field] for field in value if field != name}
            if name in known:
                yield "misspelt", f"{at}.{name}", {**rest, f"{name}s": held}, schema
            if name in schema.get("required", ()):
                yield "missing", f"{at}.{name}", rest, schema
            own = known[name] if known else schema["additionalProperties"]
            yield from slips(held, own, f"{at}.{name}")
    if isinstance(value, list):
        for number, held in enumerate(value):
            yield from slips(held, schema["items"], f"{at}[{number}]")


@pytest.mark.parametrize("name", KINDS)
def test_manifests_are_of_the_published_types(name):
    errors = Draft202012Validator(KINDS[name]).iter_errors(loaded(name))
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


@pytest.mark.parametrize("name", KINDS)
def test_a_slip_in_any_field_of_a_manifest_is_found(name):
    found = list(slips(loaded(name), KINDS[name]))
    assert {kind for kind, *_ in found} == {"another type", "misspelt", "missing"}
    assert [(kind, at) for kind, at, value, schema in found if is_valid(value, schema)] == []


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (TEXTS, {"num-cpus": 0}),  # of rayStartParams, which are text
        (CLUSTER["properties"]["autoscalerOptions"], {"upscalingMode": "Fast"}),
        (KINDS["raycluster.yaml"]["properties"]["apiVersion"], "ray.io/v1alpha1"),
        (QUANTITY, "16 GB"),
        (INT32, 2**31),
    ],
)
def test_values_that_kuberay_refuses_are_found(schema, value):
    assert not is_valid(value, schema)
